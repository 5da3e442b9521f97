"""Attention that reads keys and values once for each group of query heads."""

from __future__ import annotations

from torch.fx import Graph, Node

from ...passes import fx, ops


def share_heads(graph: Graph) -> None:
    """Makes attention read the stored heads, in place.

    A model repeats the heads of the full cache before attention. ONNX's Attention (opset 23) and
    `translations.attention` know groups, as SDPA does, so the repeats are not needed.
    """
    for node in graph.nodes:
        if not fx.is_op(node, ops.SDPA):
            continue
        query, key, value = node.args[:3]
        stored_key, stored_value = (fx.see_through_repeat_kv(n) for n in (key, value))
        if stored_key is None or stored_value is None:
            continue
        node.args = (query, _whole(stored_key), _whole(stored_value), *node.args[3:])
        node.kwargs = {**node.kwargs, "enable_gqa": True}
    graph.eliminate_dead_code()


def _whole(node: Node) -> Node:
    """The source of slices that take all of it. Runtimes would copy such a slice."""
    while fx.is_op(node, ops.SLICE) and fx.shape(node) == fx.shape(fx.operand(node)):
        node = fx.operand(node)
    return node
