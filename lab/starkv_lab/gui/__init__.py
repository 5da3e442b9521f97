"""`starkv bench gui` runs published GUI benchmarks on a model of the user.

It reads the published files of ScreenSpot-v2, ScreenSpot-Pro, AndroidControl and AgentNetBench,
lets a Hugging Face model answer from a compressed cache, and judges by each benchmark's published
rule. Importing this package imports no torch.
"""
