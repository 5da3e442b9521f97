"""Attention that is given keys and values once a group, not once a query head."""

from __future__ import annotations

from torch.fx import Graph, Node

from ...passes import fx


def share_heads(graph: Graph) -> None:
    """Let attention read heads where they are stored, in place.

    ONNX's Attention (opset 23) knows groups, as SDPA does, and so does `translations.attention`; a
    model repeats the heads of the whole cache before it.
    """
    for node in graph.nodes:
        if not fx.is_op(node, fx.SDPA):
            continue
        query, key, value = node.args[:3]
        stored_key, stored_value = (fx.see_through_repeat_kv(n) for n in (key, value))
        if stored_key is None or stored_value is None:
            continue
        node.args = (query, _whole(stored_key), _whole(stored_value), *node.args[3:])
        node.kwargs = {**node.kwargs, "enable_gqa": True}
    graph.eliminate_dead_code()


def _whole(node: Node) -> Node:
    """What the node is a slice of, where that is all of it: runtimes would copy it."""
    while fx.is_op(node, fx.SLICE) and fx.shape(node) == fx.shape(fx.operand(node)):
        node = fx.operand(node)
    return node
