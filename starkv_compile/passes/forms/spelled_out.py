"""product(softmax(product(q, k^T) * scale + mask), v), as people write it and as ATen has it.

This is models' own attention, in Dynamo's graphs and in exported ones: products by matmul, bmm or
einsum, heads folded into the batch or in groups, dimensions in any order. It is also what
decompositions make of scaled_dot_product_attention: the scale's root on queries and on keys, a
softmax that is zero for a query that sees nothing, or a softmax in steps of exp, sum and a
division.
"""

from __future__ import annotations

from itertools import pairwise

from torch.fx import Node

from .. import fx
from ..axes import Axes, Dims, Group, Product, Step
from ..functional import is_intact
from ..sites import Attention
from .logits import PRODUCT, read_logits
from .masks import Mask, combined
from .operands import Operands, read_operands
from .reasons import why_not
from .softmax import input_of, path_to_softmax, softmax_dim, zeroes_more


def read(node: Node) -> Attention | None:
    """`node` as an attention if it is the second product. Its mask says what is hidden."""
    if not fx.is_op(node, PRODUCT) or not fx.shape(node):
        return None
    second = Axes().product(node)
    for side in () if second is None else (0, 1):
        found = _read(node, side)
        if found is not None:
            return found
    return None


def _read(node: Node, side: int) -> Attention | None:
    """`node` as an attention if this side of it has the weights."""
    axes = Axes()
    second = axes.product(node)
    assert second is not None
    to_softmax = path_to_softmax(second.sides[side])
    logits = None if to_softmax is None else read_logits(input_of(to_softmax[-1]))
    first = None if logits is None else axes.product(logits.path[-1])
    if to_softmax is None or logits is None or first is None:
        return None
    if zeroes_more(to_softmax, logits):
        return None
    dims = _dims_after(axes, [*reversed(logits.path), *reversed(to_softmax)], first)
    if dims is None or not _agree(axes, second.dims[side], dims[second.sides[side]]):
        return None
    softmax = to_softmax[-1]
    length = axes.whole(dims[softmax][softmax_dim(softmax)])
    if length != axes.whole(second.summed):
        return None
    varied = {
        axis
        for mask in logits.masks
        for axis in _axes_that_vary(axes, mask, dims[mask.at])
        if axis not in length
    }
    found = _operands(node, axes, first, second, side, length, varied)
    masks = None if found is None else combined(axes, found.roles, logits.masks, dims)
    if found is None or masks is None:
        return None
    mask, hides = masks
    sources = () if mask is None else getattr(mask, "sources", (mask,))
    if not all(is_intact(source, node) for source in sources):
        return None
    return Attention(
        node=node,
        form="spelled out",
        query=found.query.computed(),
        key=found.key,
        value=found.value,
        mask=mask,
        causal=False,
        scale=logits.scale * found.factor,
        mask_hides=hides,
    )


def _operands(
    node: Node,
    axes: Axes,
    first: Product,
    second: Product,
    side: int,
    length: Group,
    varied: set[int],
) -> Operands | None:
    """Query, key and value. The keys are the side of the first product that has their tokens."""
    keys = next(
        (s for s in (1, 0) if length in [axes.whole(group) for group in first.free[s]]), None
    )
    if keys is None:
        return None
    key = Step(first.sides[keys], first.dims[keys], 1.0)
    query = Step(first.sides[1 - keys], first.dims[1 - keys], 1.0)
    value = Step(second.sides[1 - side], second.dims[1 - side], 1.0)
    of_values = [axes.whole(group) for group in second.free[1 - side]]
    if len(of_values) != 1:
        return None
    free = first.free[1 - keys]
    asked = free[-1] if free else ()
    lengths = (asked, length, first.summed, of_values[0])
    return read_operands(node, axes, (query, key, value), lengths, free, varied)


def _dims_after(axes: Axes, path: list[Node], product: Product) -> dict[Node, Dims] | None:
    """The dimensions at each node of a path that begins with the product."""
    dims = {path[0]: product.out}
    for source, node in pairwise(path):
        after = axes.after(node, source, dims[source])
        if after is None:
            return None
        dims[node] = after
    return dims


def _agree(axes: Axes, new: Dims, known: Dims) -> bool:
    """Makes the new dimensions of a tensor the known ones."""
    return all(axes.equate(a, b) for a, b in zip(new, known, strict=True))


def _axes_that_vary(axes: Axes, mask: Mask, dims: Dims) -> list[int]:
    sizes = fx.shape(mask.node)
    own = dims[len(dims) - len(sizes) :] if sizes else []
    varied = (g for g, n in zip(own, sizes, strict=True) if not (isinstance(n, int) and n == 1))
    return [axis for group in varied for axis in axes.whole(group)]


__all__ = ["read", "why_not"]
