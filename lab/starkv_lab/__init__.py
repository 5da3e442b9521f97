"""The laboratory of starkv-compile: a demo agent, an inspector, benchmarks and a model matrix.

It uses public names of `starkv_compile` only. Importing it does not import torch.
"""

__version__ = "0.1.0"
