"""Cuts the rewritten graph in two: what computes the answer, and what only the cache reads.

Scores and compaction are the same operations in every layer. They are captured once and called for
each layer, so the export of a deep model takes no longer than that of its plain decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ...passes import fx, ops

SIZE = (torch.ops.aten.sym_size.int,)
JOINING = ops.CAT + (torch.ops.aten.slice.Tensor,)
"""Joins of cached and new tokens. Both parts compute them, which costs less than to pass them on;
duplicates are removed later."""


@dataclass(frozen=True)
class Part:
    """A piece of a graph as its own module, which takes a dict and returns one.

    reads, gives: for the names in those dicts, the nodes of the whole graph that they stand for.
    """

    module: GraphModule
    reads: dict[str, Node]
    gives: dict[str, Node]

    def same_as(self, other: Part) -> bool:
        """Whether both compute the same function."""
        return self.module.code == other.module.code and all(
            _kind(node) == _kind(other.reads[name]) for name, node in self.reads.items()
        )


def carve(
    module: GraphModule,
    inputs: dict[str, Node],
    answer: dict[str, Node],
    layers: Sequence[dict[str, Node]],
) -> tuple[Part, list[Part]]:
    """Returns (answer, cache) of a graph: the part that computes `answer`, and one for each layer.

    The answer's part also returns what the others read from it, as `inner.1`, `inner.2` ..., in the
    order of their `reads`. Those are `in_0`, `in_1` ...

    Args:
        inputs, answer, layers: nodes of `module`, with their names in the parts as keys.
    """
    changing = [node for node in module.graph.nodes if _writes_in_place(node)]
    behind_answer = _ancestors([*answer.values(), *changing], lambda node: False)
    weighed = _behind_weights(module.graph)

    def is_boundary(node: Node) -> bool:
        if node.op == "placeholder":
            return True
        computed = node in behind_answer and node in weighed and not fx.is_op(node, JOINING)
        return computed and isinstance(fx.value(node), torch.Tensor)

    parts = []
    for wanted in layers:
        needed = _ancestors(wanted.values(), is_boundary)
        passed_on = [node for node in wanted.values() if is_boundary(node)]
        reads = _in_order_of_use(module.graph, needed, is_boundary, passed_on)
        needed -= {n for n in needed if is_boundary(n) and n not in reads}
        named = {f"in_{i}": node for i, node in enumerate(reads)}
        parts.append(_part(module, needed, named, wanted))
    read = dict.fromkeys(n for p in parts for n in p.reads.values() if n.op != "placeholder")
    inner = {f"inner.{i}": node for i, node in enumerate(read, 1)}
    return _part(module, behind_answer, inputs, {**answer, **inner}), parts


def _writes_in_place(node: Node) -> bool:
    """Whether a node has an effect although no node reads it (Qwen3-VL's rotary embedding)."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _ancestors(nodes: Iterable[Node], beyond: Callable[[Node], bool]) -> set[Node]:
    """`nodes` and everything they are computed from. It does not look behind nodes `beyond`."""
    found, queue = set(nodes), list(nodes)
    while queue:
        node = queue.pop()
        if beyond(node):
            continue
        new = set(fx.producers(node)) - found
        found |= new
        queue += new
    return found


def _behind_weights(graph: Graph) -> set[Node]:
    """Nodes that depend on weights. Masks, indices and lengths do not."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or any(source in found for source in fx.producers(node)):
            found.add(node)
    return found


def _in_order_of_use(
    graph: Graph,
    needed: set[Node],
    is_boundary: Callable[[Node], bool],
    passed_on: Sequence[Node],
) -> tuple[Node, ...]:
    """What is read, in order of first use, then what is `passed_on`: the same in all layers.

    A length can come from any tensor that has it, here the first of another layer: see `_length`.
    """
    order: dict[Node, None] = {}
    lengths = []
    for node in graph.nodes:
        if node not in needed or is_boundary(node):
            continue
        if fx.is_op(node, SIZE):
            lengths.append(node)
            continue
        order.update(dict.fromkeys(n for n in fx.producers(node) if is_boundary(n)))
    order.update(dict.fromkeys(passed_on))
    missing = [n for n in lengths if _length(n, tuple(order)) is None]
    return tuple(dict.fromkeys([*order, *(node.args[0] for node in missing)]))


def _length(size: Node, reads: Sequence[Node]) -> tuple[Node, int] | None:
    """The first of `reads` with the length that `size` asks for, and in which dimension."""
    tensor, dim = fx.bind(size, "self", "dim").values()
    wanted = str(fx.shape(tensor)[dim])
    for node in reads:
        for i, length in enumerate(fx.shape(node)):
            if str(length) == wanted:
                return node, i
    return None


def _part(
    module: GraphModule, needed: set[Node], reads: dict[str, Node], gives: dict[str, Node]
) -> Part:
    graph, copies = Graph(), {}
    ports = graph.placeholder("ports")
    for name, node in reads.items():
        copies[node] = graph.call_function(getitem, (ports, name))
        copies[node].meta = dict(node.meta)
    inputs = tuple(reads.values())
    for node in module.graph.nodes:
        if node not in needed or node in copies:
            continue
        found = _length(node, inputs) if fx.is_op(node, SIZE) else None
        if found is not None:
            copies[node] = graph.call_function(SIZE[0], (copies[found[0]], found[1]))
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].name = f"n{len(copies)}"  # no layer's number in it: see `Part.same_as`
    graph.output({name: copies[node] for name, node in gives.items()})
    return Part(GraphModule(module, graph), reads, gives)


def _kind(node: Node) -> tuple[Any, ...]:
    tensor = fx.value(node)
    return tuple(map(str, tensor.shape)), tensor.dtype
