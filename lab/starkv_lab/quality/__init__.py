"""What a compressed cache still answers: `starkv bench quality`.

The shipped agent is given held-out screens and one question; a policy compacts the cache; then
that question and others are put to what is left. Importing this package imports no torch.
"""
