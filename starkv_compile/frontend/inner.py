"""Compiles a rewritten graph with the inner backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from ..kernels.compiling import in_process
from ..optional import TORCH_TENSORRT_SETTINGS, needs_tensorrt

TENSORRT = "torch_tensorrt"
"""The package. Its import registers its backend under the same name."""


def check_inner(name: str) -> None:
    """Raises `MissingPackage` for "tensorrt" if torch-tensorrt cannot be imported."""
    if name == "tensorrt":
        needs_tensorrt(TENSORRT)


def compile_inner(
    module: GraphModule, example_inputs: Sequence[Any], inner: str, mode: str | None
) -> Callable[..., Any]:
    """Compiles with "inductor", "aot_eager" or "tensorrt"; "eager" runs the graph as it is."""
    if inner == "eager":
        return module.forward
    if inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(module, list(example_inputs))
    if inner == "tensorrt":
        from torch._dynamo.backends.registry import lookup_backend

        check_inner(inner)
        backend: Any = lookup_backend(TENSORRT)
        return backend(module, list(example_inputs), options=dict(TORCH_TENSORRT_SETTINGS))
    from torch._inductor.compile_fx import compile_fx

    patches = torch._inductor.list_mode_options(mode) if mode else None
    with in_process():
        compiled: Any = compile_fx(module, example_inputs, config_patches=patches)
    return compiled
