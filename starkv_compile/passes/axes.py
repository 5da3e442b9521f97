"""Which dimension of one tensor is which of another, through every change of shape between them.

An *axis* is a number for a run of elements: batch, head, token, or a part of them. Each dimension
of a tensor is a group of axes, outermost first: [B * H, S, D] is ((b, h), (s,), (d,)). A dimension
of size 1 is the empty group. When a reshape takes a dimension apart, its axis is split, for all
tensors that have it.
"""

from __future__ import annotations

import operator
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import fx, ops

Group = tuple[int, ...]
Dims = list[Group]


class Product(NamedTuple):
    """A sum of products of two tensors: matmul, bmm, einsum.

    free: the dimensions of the result that only this side has, in the result's order.
    """

    sides: tuple[Node, Node]
    dims: tuple[Dims, Dims]
    out: Dims
    summed: Group
    free: tuple[Dims, Dims]


class Step(NamedTuple):
    """An operand is `node` times `factor`, with other dimensions."""

    node: Node
    dims: Dims
    factor: float


class Axes:
    """The axes of one attention."""

    def __init__(self) -> None:
        self._sizes: list[Any] = []
        self._parts: dict[int, Group] = {}

    def new(self, size: Any) -> Group:
        """A dimension of its own."""
        if _is_one(size):
            return ()
        self._sizes.append(size)
        return (len(self._sizes) - 1,)

    def whole(self, group: Group) -> Group:
        """The group with the parts of every axis that was split."""
        parts = (
            self.whole(self._parts[axis]) if axis in self._parts else (axis,) for axis in group
        )
        return tuple(axis for part in parts for axis in part)

    def size(self, group: Group) -> Any:
        total: Any = 1
        for axis in self.whole(group):
            total = total * self._sizes[axis]
        return total

    def equate(self, new: Group, known: Group) -> bool:
        """Makes a dimension of its own the same as a known group. False if they differ in size."""
        if not new or not known:
            return new == known
        (axis,) = new
        if not fx.same(self._sizes[axis], self.size(known)):
            return False
        self._parts[axis] = self.whole(known)
        return True

    def regroup(self, dims: Dims, sizes: Sequence[Any]) -> Dims | None:
        """The dimensions after a reshape to `sizes`; None if that is unclear."""
        left = [axis for group in dims for axis in self.whole(group)]
        result: Dims = []
        for size in sizes:
            taken: list[int] = []
            missing = size
            while not _is_one(missing):
                if not left:
                    return None
                axis = left.pop(0)
                quotient = _divided(missing, self._sizes[axis])
                if quotient is None:
                    inner = _divided(self._sizes[axis], missing)
                    if inner is None:
                        return None
                    outer_part, inner_part = self.new(missing), self.new(inner)
                    self._parts[axis] = (*outer_part, *inner_part)
                    left = [*inner_part, *left]
                    taken += outer_part
                    break
                taken.append(axis)
                missing = quotient
            result.append(tuple(taken))
        return None if left else result

    def before(self, node: Node, dims: Dims) -> Step | None:
        """What a change of shape, a copy, a repeat or a factor was made of; None for other ops."""
        scaled = fx.scaled(node)
        if scaled is not None:
            return Step(scaled[0], dims, scaled[1])
        source = fx.see_through_copies(node) or fx.see_through_padding(node)
        if source is None:
            source = fx.see_through_overwriting(node)
        if source is not None:
            return Step(source, dims, 1.0)
        source = fx.operand(node) if node.op.startswith("call_") else None
        if not isinstance(source, Node) or not fx.shape(source):
            return None
        before = self._before(node, source, dims)
        return None if before is None else Step(source, before, 1.0)

    def _before(self, node: Node, source: Node, dims: Dims) -> Dims | None:
        sizes = fx.shape(source)
        order = fx.order_of_dims(node)
        if order:
            result: Dims = [()] * len(order)
            for place, dim in enumerate(order):
                result[dim] = dims[place]
            return result
        if fx.is_op(node, ops.EXPAND):
            kept = dims[len(dims) - len(sizes) :]
            return [() if _is_one(size) else group for size, group in zip(sizes, kept, strict=True)]
        if fx.is_op(node, ops.REPEAT):
            return self._before_repeat(node, dims, sizes)
        if fx.is_op(node, ops.TILE):
            return self._before_tiles(node, dims, sizes)
        return self.regroup(dims, sizes) if _keeps_order(node) else None

    def _before_repeat(self, node: Node, dims: Dims, sizes: Any) -> Dims | None:
        args = fx.bind(node, "input", "repeats", "dim")
        dim, often = args.get("dim"), fx.value(args.get("repeats"))
        if not isinstance(dim, int) or not isinstance(often, (int, torch.SymInt)):
            return None
        dim %= len(dims)
        parts = self.regroup([dims[dim]], (sizes[dim], often))
        return None if parts is None else [*dims[:dim], parts[0], *dims[dim + 1 :]]

    def _before_tiles(self, node: Node, dims: Dims, sizes: Any) -> Dims | None:
        given = node.args[1:] if len(node.args) != 2 else node.args[1]
        often: Any = given if isinstance(given, (tuple, list)) else (given,)
        if len(often) != len(sizes) or len(dims) != len(sizes):
            return None
        result: Dims = []
        for group, times, size in zip(dims, often, sizes, strict=True):
            parts = self.regroup([group], (fx.value(times), size))
            if parts is None:
                return None
            result.append(parts[1])
        return result

    def after(self, node: Node, source: Node, dims: Dims) -> Dims | None:
        """The dimensions of `node`, which copies or reshapes `source`, or works on each element."""
        order = fx.order_of_dims(node)
        if order:
            return [dims[dim] for dim in order]
        if _keeps_order(node):
            return self.regroup(dims, fx.shape(node))
        new, old = fx.shape(node), fx.shape(source)
        alike = len(new) == len(old) and all(map(fx.same, new, old))
        return dims if alike else None

    def behind(self, node: Node, dims: Dims) -> list[Step]:
        """`node` and its sources, as far as `before` sees through them."""
        steps = [Step(node, dims, 1.0)]
        while (step := self.before(steps[-1].node, steps[-1].dims)) is not None:
            steps.append(step._replace(factor=step.factor * steps[-1].factor))
        return steps

    def product(self, node: Any) -> Product | None:
        """`node` as a product of two tensors."""
        if fx.is_op(node, ops.EINSUM):
            return self._einsum(node)
        sides = fx.operands(node) if fx.is_op(node, ops.MATMUL) else None
        if sides is None or not all(isinstance(side, Node) for side in sides):
            return None
        left, right = (fx.shape(side) for side in sides)
        if min(len(left), len(right)) < 2 or not fx.shape(node):
            return None
        rows, summed, columns = self.new(left[-2]), self.new(left[-1]), self.new(right[-1])
        batch = [self.new(size) for size in fx.shape(node)[:-2]]
        of_left = [*broadcast(batch, left[:-2]), rows, summed]
        of_right = [*broadcast(batch, right[:-2]), summed, columns]
        free = ([rows], [columns])
        return Product(sides, (of_left, of_right), [*batch, rows, columns], summed, free)

    def _einsum(self, node: Node) -> Product | None:
        letters = _letters_of(node)
        if letters is None:
            return None
        sides, names, out = letters
        sizes: dict[str, Any] = {}
        for side, written in zip(sides, names, strict=True):
            for letter, size in zip(written, fx.shape(side), strict=True):
                if letter not in sizes or _is_one(sizes[letter]):
                    sizes[letter] = size
        groups = {letter: self.new(size) for letter, size in sizes.items()}
        left, right = names
        summed = [letter for letter in left if letter not in out]
        if len(summed) != 1 or summed != [letter for letter in right if letter not in out]:
            return None
        dims = tuple(
            [
                () if _is_one(n) else groups[letter]
                for letter, n in zip(name, fx.shape(s), strict=True)
            ]
            for s, name in zip(sides, names, strict=True)
        )
        free = tuple(
            [groups[x] for x in out if x in mine and x not in other]
            for mine, other in ((left, right), (right, left))
        )
        return Product(sides, dims, [groups[x] for x in out], groups[summed[0]], free)  # type: ignore[arg-type]


def _letters_of(node: Node) -> tuple[tuple[Node, Node], list[str], str] | None:
    """The operands of an einsum of two tensors, the letters of each, and those of the result."""
    equation, *rest = node.args
    if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
        rest = list(rest[0])
    plain = isinstance(equation, str) and len(rest) == 2
    if not plain or not all(isinstance(side, Node) and fx.shape(side) for side in rest):
        return None
    written, arrow, out = equation.replace(" ", "").partition("->")  # type: ignore[union-attr]
    names = written.split(",")
    unused = iter(letter for letter in string.ascii_letters if letter not in equation)  # type: ignore[operator]
    more = [
        len(fx.shape(side)) - len(n.replace("...", "")) for side, n in zip(rest, names, strict=True)
    ]
    dots = "".join(next(unused) for _ in range(max(more)))  # the last ones stand for fewer
    names = [n.replace("...", dots[len(dots) - k :]) for n, k in zip(names, more, strict=True)]
    if not arrow:
        return None
    out = out.replace("...", dots)
    fits = [len(n) == len(fx.shape(s)) == len(set(n)) for n, s in zip(names, rest, strict=True)]
    if not all(fits) or set(out) - set("".join(names)):
        return None
    return (rest[0], rest[1]), names, out  # type: ignore[return-value]


def broadcast(batch: Dims, sizes: Any) -> Dims:
    """The batch dimensions that a side has; those that it repeats are empty."""
    mine = batch[len(batch) - len(sizes) :]
    return [() if _is_one(size) else group for size, group in zip(sizes, mine, strict=True)]


def _keeps_order(node: Node) -> bool:
    """Whether `node` has all elements of its first argument, in their order."""
    if node.target is operator.getitem or node.target == "__getitem__":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(i is None or i is ... or isinstance(i, slice) for i in index)
    if fx.is_op(node, ops.SLICE):
        return True  # of all elements, or their number does not fit
    return fx.is_op(node, ops.RESHAPE + ops.UNSQUEEZE)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _divided(size: Any, divisor: Any) -> Any:
    """size / divisor, if that is whole at every length; else None."""
    if fx.same(size, divisor):
        return 1
    if _is_one(divisor):
        return size
    if not statically_known_true(size % divisor == 0):
        return None
    quotient = size // divisor
    number = quotient.node.maybe_as_int() if isinstance(quotient, torch.SymInt) else quotient
    return quotient if number is None else number
