"""Example values of inserted nodes, as Dynamo records them for its own.

AOTAutograd puts a graph into its cache on disk only if it knows which nodes are tensors.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..kernels.compiling import no_new_guards
from . import fx

EXAMPLE = "example_value"
"""Dynamo's name in the `meta` of a node."""


def record_examples(module: GraphModule, known: Collection[Node]) -> None:
    """Runs the nodes that are not `known` on example values, in order, and records the results.

    It decides nothing about symbolic lengths.
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
