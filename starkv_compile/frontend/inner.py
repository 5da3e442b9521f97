"""Compiles a rewritten graph with the inner backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..kernels.compiling import in_process, no_new_guards
from ..optional import TORCH_TENSORRT_SETTINGS, needs_tensorrt
from ..passes import fx
from .regions import compile_by_region

TENSORRT = "torch_tensorrt"
"""The package. Its import registers its backend under the same name."""


def check_inner(name: str) -> None:
    """Raises `MissingPackage` for "tensorrt" if torch-tensorrt cannot be imported."""
    if name == "tensorrt":
        needs_tensorrt(TENSORRT)


def compile_inner(
    module: GraphModule,
    example_inputs: Sequence[Any],
    inner: str,
    mode: str | None = None,
    regional: bool = False,
) -> Callable[..., Any]:
    """Compiles with "inductor", "aot_eager" or "tensorrt"; "eager" runs the graph as it is.

    regional: whether the first two compile equal layers once.
    """
    if inner == "eager":
        return module.forward
    if inner == "tensorrt":
        from torch._dynamo.backends.registry import lookup_backend

        check_inner(inner)
        backend: Any = lookup_backend(TENSORRT)
        return backend(module, list(example_inputs), options=dict(TORCH_TENSORRT_SETTINGS))
    compile_one = _aot_eager if inner == "aot_eager" else functools.partial(_inductor, mode)
    if regional:
        return compile_by_region(module, example_inputs, compile_one)
    return compile_one(module, list(example_inputs))


def _aot_eager(module: GraphModule, examples: list[Any]) -> Callable[..., Any]:
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(module, examples)


def _inductor(mode: str | None, module: GraphModule, examples: list[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    patches = torch._inductor.list_mode_options(mode) if mode else None
    with in_process():
        compiled: Any = compile_fx(module, examples, config_patches=patches)
    return compiled


TRACED_AGAIN = ("inductor", "aot_eager")
"""The inner backends that need example values on every node."""

EXAMPLE = "example_value"
"""Dynamo's name in the `meta` of a node."""


def record_examples(module: GraphModule, known: Collection[Node]) -> None:
    """Runs the nodes that are not `known` on example values, and records the results.

    AOTAutograd puts a graph into its cache on disk only if it knows which nodes are tensors. This
    decides nothing about symbolic lengths.
    """
    mode = next((m for m in map(_mode_of, module.graph.nodes) if m is not None), None)
    if mode is None:
        return
    with mode, no_new_guards(mode.shape_env):
        for node in module.graph.nodes:
            if node not in known and node.op.startswith("call_"):
                node.meta[EXAMPLE] = _run(module, node)


def _mode_of(node: Node) -> FakeTensorMode | None:
    """The mode of a node's example. Dynamo gives a backend another one for its own examples."""
    example = fx.value(node)
    return example.fake_mode if isinstance(example, FakeTensor) else None


def _run(module: GraphModule, node: Node) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), fx.value)
    target: Any = node.target
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    function = module.get_submodule(target) if node.op == "call_module" else target
    return function(*args, **kwargs)
