"""Reads the `starkv.cache_write` nodes of a graph, and replaces them."""

from __future__ import annotations

from torch.fx import Graph, Node

from ..kernels.marker import WriteArguments, Written
from . import fx, ops


def find_markers(graph: Graph) -> list[Node]:
    """The graph's markers, in order: one for each layer that a `StarKVCache` stores a prompt in."""
    return [node for node in graph.nodes if fx.is_op(node, ops.CACHE_WRITE)]


def arguments_of(marker: Node) -> WriteArguments:
    """The arguments of a marker: nodes and numbers in the place of tensors."""
    return WriteArguments(**fx.bind_schema(marker))


def read_past_markers(graph: Graph) -> None:
    """Makes all but the graph's outputs read what a marker was given, which is what it returns.

    Attention reads the results where a model takes its keys from the layer of the cache. It is for
    graphs of Dynamo: an exported graph may put the results into buffers before it returns them.
    """
    for marker in find_markers(graph):
        given = arguments_of(marker).unchanged
        for item, place in fx.items_of(marker):
            item.replace_all_uses_with(given[place], lambda user: user.op != "output")  # type: ignore[arg-type]


def replace_marker(marker: Node, written: Written) -> None:
    """Replaces each result of the marker by the node of that name, and removes the marker."""
    for item, place in fx.items_of(marker):
        item.replace_all_uses_with(written[place])  # type: ignore[arg-type]
        marker.graph.erase_node(item)
    marker.graph.erase_node(marker)
