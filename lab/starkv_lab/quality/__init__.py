"""`starkv bench quality` measures how well compressed caches answer questions.

The demo agent gets held-out screens and one question. A policy compacts the cache. Then the
agent answers that question and others from the compacted cache. Importing this package imports no
torch.
"""
