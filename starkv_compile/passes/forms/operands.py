"""What attention's operands are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.fx import Node

from .. import fx

SDPA_WAY_OUT = 'load the model with attn_implementation="sdpa"'
NO_BIAS = (
    "models with ALiBi or relative positions compute the bias of a key from its place in the "
    "cache, and compaction changes that place"
)
NO_VALUES = (
    "the graph has no example values; capture it with torch.export or torch.compile, or run "
    "torch.fx.passes.fake_tensor_prop.FakeTensorProp on it"
)


def source_of(node: Any) -> Node:
    """Keys or values before their heads were repeated and their vectors padded."""
    steps = (fx.see_through_copies, fx.see_through_repeat_kv, fx.see_through_padding)
    return fx.cached_of(list(fx.through(node, *steps)))


class Step(NamedTuple):
    """A matrix product's operand is `node` times `factor`, its last dimensions swapped or not."""

    node: Node
    factor: float
    swapped: bool


def steps_behind(node: Any) -> Iterator[Step]:
    """`node` and its sources, through copies, repeats, factors, and changes of shape."""
    factor, swapped = 1.0, False
    while isinstance(node, Node):
        yield Step(node, factor, swapped)
        scaled = fx.scaled(node)
        if scaled is not None:
            node, factor = scaled[0], factor * scaled[1]
        elif fx.swaps_last_two(node):
            node, swapped = fx.operand(node), not swapped
        else:
            steps = (fx.see_through_copies, fx.see_through_repeat_kv, fx.see_through_folding)
            node = next((inner for step in steps if (inner := step(node)) is not None), None)
