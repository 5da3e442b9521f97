"""A graph without operations in place, for the passes that only read.

`scores.masked_fill_(mask, low)` changes what every later reader of `scores` finds, and no argument
of those readers says so. Here each reader's argument is the node that computed what it finds:

    scores = q @ k                          scores = q @ k
    scores.masked_fill_(mask, low)   ->     filled = masked_fill_(scores, mask, low)
    softmax(scores)                         softmax(filled)

Nobody runs this graph, so nodes keep their targets. A tensor that was changed through another view
of its memory becomes `changed(tensor, writer)`, through which no form sees.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.fx import Graph, Node

from . import fx

IN_PLACE = (
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.ilshift,
    operator.irshift,
)
NOT_THE_ELEMENTS = ("requires_grad_", "share_memory_", "detach_", torch.ops.aten.detach_.default)
"""Operations with the name of one in place that leave the elements as they are."""
_OVERWRITTEN = "starkv_overwritten"


def changed(before: Any, writer: Any) -> Any:
    """Stands for a tensor of which `writer` changed some or all elements."""
    raise NotImplementedError("nodes of this function are read, not run")


class FunctionalGraph:
    """A functional copy of a graph, or the graph itself if nothing in it works in place.

    Attributes:
        graph: the copy.
        written: nodes of the given graph whose memory it changes in place, with all their views.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.written: set[Node] = set()
        self._given: dict[Node, Node] = {}
        self._copied: dict[Node, Node] = {}
        if any(written_by(node) for node in graph.nodes):
            self._copy(graph)

    def given(self, node: Node) -> Node:
        """The node of the given graph that holds what `node` computes, until it is overwritten."""
        return self._given.get(node, node)

    def copied(self, node: Node) -> Node:
        """The copy of a node of the given graph."""
        return self._copied.get(node, node)

    def _copy(self, graph: Graph) -> None:
        self.graph = Graph(graph.owning_module)
        holds: dict[Node, Node] = {}  # what a tensor of the given graph holds by now
        memory = _Memory()
        for node in graph.nodes:
            new = self.graph.node_copy(node, holds.__getitem__)
            memory.add(node)
            holds[node] = self._copied[node] = new
            self._given[new] = node
            _drop_out(new)
            for target in written_by(node):
                self._write(node, target, memory.views_of(target), holds)

    def _write(self, node: Node, target: Node, views: list[Node], holds: dict[Node, Node]) -> None:
        """Lets all views of the memory of `target` hold what `node` has written."""
        new = self._copied[node]
        self.written.update(views)
        if fx.value(node) is None:  # `x[i] = y` has no result
            new.meta = dict(holds[target].meta)
            self._given[new] = target
        whole = _same_elements(new, target)
        for view in views:
            if view is node:
                continue
            before = holds[view]
            before.meta[_OVERWRITTEN] = new
            if whole and _same_elements(view, target):
                holds[view] = new
                continue
            if _is_reshaped(view, new):
                after = self.graph.call_function(torch.reshape, (new, fx.shape(view)))
            else:
                after = self.graph.call_function(changed, (before, new))
            after.meta = {k: v for k, v in before.meta.items() if k != _OVERWRITTEN}
            self._given[after] = view
            holds[view] = after
        new.meta.pop(_OVERWRITTEN, None)


def is_intact(node: Any, reader: Node) -> bool:
    """Whether right after `reader` the memory of `node` still holds what `node` computed."""
    writer = node.meta.get(_OVERWRITTEN) if isinstance(node, Node) else None
    return writer is None or bool(reader < writer)


def written_by(node: Node) -> list[Node]:
    """The nodes whose elements `node` changes in place."""
    if node.op not in ("call_function", "call_method") or node.target in NOT_THE_ELEMENTS:
        return []
    schema = fx.schema_of(node)
    if schema is not None:
        args = fx.bind_schema(node)
        names = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        return [n for name in names for n in _nodes(args.get(name))]
    first = fx.bind(node, "input").get("input", node.kwargs.get("self"))
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return fx.producers(node) if "mutation" in str(node.target) else []
    if node.target is operator.setitem or _works_in_place(node):
        return _nodes(first)
    return _nodes(node.kwargs.get("out"))


def _works_in_place(node: Node) -> bool:
    if node.target in IN_PLACE:
        return isinstance(fx.value(fx.operand(node)), torch.Tensor)
    if node.kwargs.get("inplace") is True:
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    dunder = name.startswith("__")
    if dunder:
        return name == "__setitem__" or (name.startswith("__i") and name[3:-2] in _NAMES)
    return name.endswith("_")


_NAMES = {function.__name__[1:] for function in IN_PLACE}


def _nodes(argument: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg(argument, found.append)
    return found


def _same_elements(left: Node, right: Node) -> bool:
    """Whether two views of one memory are the same elements in the same order."""
    a, b = fx.value(left), fx.value(right)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dtype != b.dtype:
        return False
    if a.dim() != b.dim() or not fx.same(a.storage_offset(), b.storage_offset()):
        return False
    pairs = zip((*a.shape, *a.stride()), (*b.shape, *b.stride()), strict=True)
    return all(fx.same(x, y) for x, y in pairs)


def _is_reshaped(view: Node, new: Node) -> bool:
    """Whether a view has all elements of another tensor in the same order, in another shape."""
    a, b = fx.value(view), fx.value(new)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dtype != b.dtype:
        return False
    begin_alike = fx.same(a.storage_offset(), b.storage_offset())
    dense = a.is_contiguous() and b.is_contiguous()
    return bool(dense and begin_alike and fx.same(a.numel(), b.numel()))


def _drop_out(node: Node) -> None:
    """Makes `op(x, out=y)` the `op(x)` that returns the same."""
    if "out" not in node.kwargs:
        return
    node.kwargs = {name: given for name, given in node.kwargs.items() if name != "out"}
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        packet = target.overloadpacket
        wanted = [(a.name, str(a.type)) for a in target._schema.arguments if not a.is_out]
        for overload in (getattr(packet, name) for name in packet.overloads()):
            if [(a.name, str(a.type)) for a in overload._schema.arguments] == wanted:
                node.target = overload


class _Memory:
    """Which nodes share memory: by their example values, by schemas, and by the name of a buffer.

    A program that was saved and loaded has example values that share nothing, but every op in it
    has a schema.
    """

    def __init__(self) -> None:
        self._shared: dict[Any, set[Any]] = {}  # of nodes, storages and names of buffers

    def add(self, node: Node) -> None:
        joined: set[Any] = {node}
        for member in (*_memories(node), *_viewed(node)):
            joined |= self._shared.get(member, {member})
        for member in joined:
            self._shared[member] = joined

    def views_of(self, node: Node) -> list[Node]:
        return sorted(member for member in self._shared[node] if isinstance(member, Node))


def _memories(node: Node) -> Iterator[Any]:
    if node.op == "get_attr":
        yield node.target
    example = fx.value(node)
    for tensor in example if isinstance(example, (tuple, list)) else (example,):
        if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
            yield _without_vmap(tensor).untyped_storage()._cdata


def _without_vmap(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that vmap has wrapped, as in the mask functions of flex_attention."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def _viewed(node: Node) -> Iterator[Node]:
    """The arguments whose memory a registered op returns; the tuple that an item is of."""
    if node.target is operator.getitem and isinstance(fx.value(node.args[0]), (tuple, list)):
        yield from _nodes(node.args[0])
    schema = fx.schema_of(node)
    for argument in schema.arguments if schema is not None else ():
        if argument.alias_info is not None:
            yield from _nodes(fx.bind_schema(node).get(argument.name))
