"""GUI benchmarks on a model of one's own: `starkv bench gui`.

Reads the published files of ScreenSpot-v2, ScreenSpot-Pro, AndroidControl and AgentNetBench, lets
a Hugging Face model answer on a compressed cache, and judges by each benchmark's published rule.
Importing this package imports no torch.
"""
