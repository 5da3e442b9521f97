"""The laboratory of starkv-compile: a demo agent, an inspector, benchmarks and a model matrix.

It uses the public names of `starkv_compile` alone. Importing it imports no torch.
"""

__version__ = "0.1.0"
