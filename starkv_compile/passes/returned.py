"""Graph outputs that hold keys and values: [B, G, L, D], in another order or type, or stacked."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from . import fx, ops

Lengths = dict[Node, int]
"""Tensors that get fewer tokens, each with its dimension of tokens."""
Together = Callable[[Any, Any], Any]
"""Makes one tensor of a key's and a value's."""

Half = tuple[Node, int, bool, int]
"""(whole, dimension, whether that dimension is of the two halves, which half)"""

ALIKE = ops.CAST + ops.COPY
"""Operations on each element by itself, which can as well be done to fewer tokens."""


def is_stored(node: Node) -> bool:
    """Whether a cache stores `node`: a marker reads it, or a graph output is made of it."""
    for user in node.users:
        if user.op == "output" or fx.is_op(user, ops.CACHE_WRITE):
            return True
        if _sources(user) and is_stored(user):
            return True
    return False


class Outputs:
    """The outputs of a graph, as nodes of its functional copy."""

    def __init__(self, graph: Graph) -> None:
        self._returned = list(dict.fromkeys(fx.outputs(graph)))

    def made_of(self, node: Node) -> list[Node]:
        """The outputs that are made of `node`."""
        return [output for output in self._returned if node in _made_of(output)]

    def are_whole(self, node: Node, lengths: Lengths) -> bool:
        """Whether all outputs that are made of `node` are made of shorter tensors alone."""
        return all(_tokens_of(output, lengths) is not None for output in self.made_of(node))

    def rebuilt(self, lengths: Lengths, new: dict[Node, Any]) -> Iterator[tuple[Node, Any]]:
        """The outputs that are made of shorter tensors, with proxies of what they are then."""
        done = dict(new)
        for output in self._returned:
            if new.keys().isdisjoint(_made_of(output)):
                continue
            proxy = _rebuilt(output, lengths, done)
            ordered = output in new or not fx.value(output).is_contiguous()
            yield output, proxy if ordered else proxy.contiguous()


class Pair(NamedTuple):
    """A tensor of two halves: stacked in dimension `dim`, or side by side in it."""

    whole: Node
    dim: int
    is_stack: bool
    together: Together


def joined(key: Node, value: Node) -> Pair | None:
    """The tensor of which `key` and `value` are the two halves, if they are."""
    first, second = _half_of(key), _half_of(value)
    if first is None or second is None or first[:3] != second[:3]:
        return None
    whole, dim, is_stack, place = first
    if {place, second[3]} != {0, 1}:
        return None
    join = torch.stack if is_stack else torch.cat

    def together(one: Any, other: Any) -> Any:
        return join([one, other] if place == 0 else [other, one], dim=dim)

    return Pair(whole, dim, is_stack, together)


def _half_of(node: Node) -> Half | None:
    """What `node` is a half of, if it is."""
    source = fx.operand(node) if node.op.startswith("call_") else None
    if not isinstance(source, Node):
        return None
    if node.target is operator.getitem and isinstance(fx.value(source), (tuple, list)):
        pieces, place = fx.value(source), node.args[1]
        whole = fx.operand(source)
        if len(pieces) != 2 or not isinstance(whole, Node) or not fx.shape(whole):
            return None
        is_stack = fx.is_op(source, ops.UNBIND)
        if not is_stack and not fx.is_op(source, ops.SPLIT):
            return None
        named = (
            fx.bind(source, "input", "dim") if is_stack else fx.bind(source, "input", "n", "dim")
        )
        dim = named.get("dim", 0) % len(fx.shape(whole))
        return whole, dim, is_stack, int(place)  # type: ignore[arg-type]
    if fx.is_op(node, ops.SELECT):
        args = fx.bind(node, "input", "dim", "index")
        dim, place = args["dim"] % len(fx.shape(source)), args["index"]
        of_two = isinstance(place, int) and fx.same(fx.shape(source)[dim], 2)
        return (source, dim, True, place % 2) if of_two else None
    if node.target is fx.aten.slice.Tensor:
        dim, begin = (*node.args, 0, 0)[1:3]
        return _half_sliced(node, source, dim, begin)
    if node.target is not operator.getitem:
        return None
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    places = _by_dimension(index, len(fx.shape(source)))
    some = [(dim, entry) for dim, entry in places.items() if entry != slice(None)]
    if len(some) != 1:
        return None
    ((dim, entry),) = some
    if isinstance(entry, slice):
        return _half_sliced(node, source, dim, entry.start or 0)
    of_two = isinstance(entry, int) and fx.same(fx.shape(source)[dim], 2)
    return (source, dim, True, entry % 2) if of_two else None


def _half_sliced(node: Node, whole: Node, dim: Any, begin: Any) -> Half | None:
    """The half of a tensor that is a slice of it."""
    size, full = fx.shape(node)[dim], fx.shape(whole)[dim]
    if not fx.same(size * 2, full) or not (begin == 0 or fx.same(begin, size)):
        return None
    return whole, dim % len(fx.shape(whole)), False, int(begin != 0)


def _by_dimension(index: Any, rank: int) -> dict[int, Any]:
    """The entries of an index, by the dimension that each is for; {} if it makes dimensions."""
    if any(entry is None for entry in index):
        return {}
    before = index.index(...) if ... in index else len(index)
    after = index[before + 1 :]
    return {
        **dict(enumerate(index[:before])),
        **{rank - len(after) + i: e for i, e in enumerate(after)},
    }


def _sources(node: Node) -> list[Node]:
    """What `node` puts into another order, into another type, or together; [] for other ops."""
    stacked = _stack(node)
    if stacked is not None:
        return stacked[0]
    if fx.is_op(node, ops.CAT):
        tensors = fx.bind(node, "tensors", "dim").get("tensors")
        several = isinstance(tensors, (tuple, list)) and all(isinstance(t, Node) for t in tensors)
        return list(tensors) if several else []  # type: ignore[arg-type]
    if fx.order_of_dims(node) or fx.is_op(node, ALIKE + ops.RESHAPE + ops.WIDEN):
        source = fx.operand(node)
        return [source] if isinstance(source, Node) and fx.shape(source) else []
    return []


def _stack(node: Node) -> tuple[list[Node], int] | None:
    """(tensors, dimension) of a stack, in one call or decomposed into a cat and a reshape."""
    join = fx.operand(node) if fx.is_op(node, ops.RESHAPE) else node
    if not isinstance(join, Node) or not fx.is_op(join, ops.STACK if join is node else ops.CAT):
        return None
    args = fx.bind(join, "tensors", "dim")
    tensors: Any = args.get("tensors")
    if not isinstance(tensors, (tuple, list)) or not all(isinstance(t, Node) for t in tensors):
        return None
    sizes = fx.shape(tensors[0])
    dim = args.get("dim", 0) % (len(sizes) + (join is node))
    wanted = (*sizes[:dim], len(tensors), *sizes[dim:])
    new = fx.shape(node)
    alike = len(new) == len(wanted) and all(map(fx.same, new, wanted))
    return (list(tensors), dim) if alike else None


def _made_of(node: Node) -> Iterator[Node]:
    yield node
    for source in _sources(node):
        yield from _made_of(source)


def _tokens_of(node: Node, lengths: Lengths) -> int | None:
    """The dimension of tokens of a tensor that is made of shorter ones alone; None for others."""
    if node in lengths:
        return lengths[node]
    sources = _sources(node)
    places = {_tokens_of(source, lengths) for source in sources}
    place = places.pop() if len(places) == 1 else None
    if place is None:
        return None
    stacked = _stack(node)
    if stacked is not None:
        return place + (stacked[1] <= place)
    if fx.is_op(node, ops.CAT):
        return None if _joined_along(node) == place else place
    order = fx.order_of_dims(node)
    if order:
        return order.index(place)
    if fx.is_op(node, ALIKE):
        return place
    return _after_reshape(fx.shape(sources[0]), fx.shape(node), place)


def _after_reshape(old: Any, new: Any, place: int) -> int | None:
    """Where a dimension is after a reshape that neither splits nor merges it."""
    before = _product(old[:place])
    for dim, size in enumerate(new):
        if fx.same(size, old[place]) and fx.same(_product(new[:dim]), before):
            unknown = [n for i, n in enumerate(new) if i != dim and not isinstance(n, int)]
            return dim if len(unknown) < 2 else None
    return None


def _product(sizes: Any) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _joined_along(node: Node) -> int:
    dim = fx.bind(node, "tensors", "dim").get("dim", 0)
    return int(dim) % len(fx.shape(node))


def _rebuilt(node: Node, lengths: Lengths, done: dict[Node, Any]) -> Any:
    if node in done:
        return done[node]
    sources = _sources(node)
    proxies = [_rebuilt(source, lengths, done) for source in sources]
    order = fx.order_of_dims(node)
    stacked = _stack(node)
    if stacked is not None:
        result = torch.stack(proxies, dim=stacked[1])
    elif fx.is_op(node, ops.CAT):
        result = torch.cat(proxies, dim=_joined_along(node))
    elif order:
        result = proxies[0].permute(*order)
    elif fx.is_op(node, ALIKE):
        result = proxies[0].to(fx.value(node).dtype)
    else:
        tokens = proxies[0].shape[_tokens_of(sources[0], lengths)]
        sizes: list[Any] = [n if isinstance(n, int) else -1 for n in fx.shape(node)]
        place = _tokens_of(node, lengths)
        assert place is not None
        sizes[place] = tokens
        result = proxies[0].reshape(*sizes)
    done[node] = result
    return result
