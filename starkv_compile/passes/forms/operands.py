"""What attention's operands are made of."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from torch.fx import Node

from .. import fx
from ..axes import Axes, Dims, Group, Step, broadcast
from ..functional import is_intact
from ..returned import is_stored
from ..sites import Arranged

SDPA_WAY_OUT = (
    "compute it with torch.nn.functional.scaled_dot_product_attention (a transformers model: load "
    'it with attn_implementation="sdpa")'
)
NO_BIAS = (
    "models with ALiBi or relative positions compute the bias of a key from its place in the "
    "cache, and compaction changes that place"
)
NO_VALUES = (
    "the graph has no example values; capture it with torch.export or torch.compile, or run "
    "torch.fx.passes.fake_tensor_prop.FakeTensorProp on it, with "
    "FakeTensorMode(allow_non_fake_inputs=True)"
)


NOT_4D = (
    "queries are not [batch, heads, tokens, elements], and it is unclear which dimension is which; "
    "pass four dimensions to attention"
)


class Operands(NamedTuple):
    """Queries [B, H, S, D], keys [B, G, L, D] and values [B, G, L, E] of one attention.

    factor: what the products of these queries and keys are multiplied by. roles: the groups of
    batch, query heads, queries and keys.
    """

    query: Arranged
    key: Arranged
    value: Arranged
    factor: float
    roles: Dims


def read_operands(
    node: Node,
    axes: Axes,
    sides: tuple[Step, Step, Step],
    lengths: tuple[Group, Group, Group, Group],
    queries: Sequence[Group] = (),
    masked: Collection[int] = (),
    as_read: bool = False,
    batch: Group | None = None,
) -> Operands | None:
    """The operands of the attention `node`, if they are those that this package knows.

    Args:
        sides: query, key and value as the products read them.
        lengths: the groups of the queries, the keys, the elements of a key and those of a value.
        queries: dimensions that only queries have. One of them is the queries', the others are
            heads of a group. Empty: the first of `lengths` it is.
        masked: axes along which a mask differs.
        as_read: whether the queries are those that the node reads, not what they were made of.
        batch: the group of the batch, if it is known.
    """
    chains = [axes.behind(side.node, side.dims) for side in sides]
    first, length, width, of_values = (axes.whole(group) for group in lengths)
    keys = [step for step in chains[1] if is_intact(step.node, node)]
    values = [s for s in chains[2] if s.factor == 1.0 and is_intact(s.node, node)]
    merged = _merged(axes, chains, {*width[-1:], *of_values[-1:]})
    for key, value in _pairs(keys, values):
        shared = _axes_of(axes, key, (*length, *width))
        of_batch = _batch_of(axes, chains, shared, merged) if batch is None else axes.whole(batch)
        if of_batch is None:
            continue
        groups = tuple(axis for axis in shared if axis not in of_batch)
        heads = merged | _merged(axes, chains[:1], set(groups))
        heads |= _next_to(axes, chains[0], groups, width)
        asked = _queries_of([axes.whole(group) for group in queries], heads, masked, first)
        if asked is None:
            continue
        known = {*of_batch, *groups, *asked}
        repeated = (a for a in _axes_of(axes, chains[0][0], width) if a not in known)
        roles = [of_batch, (*groups, *repeated), asked, length]
        of_key = _arranged(axes, key, [of_batch, groups, length, width])
        of_value = _arranged(axes, value, [of_batch, groups, length, of_values])
        if of_key is None or of_value is None:
            continue
        asking = [
            (found, step.factor * key.factor)
            for step in (chains[0] if as_read else reversed(chains[0]))
            if is_intact(step.node, node)
            and (found := _arranged(axes, step, [*roles[:3], width])) is not None
            and _same_width(found, of_key)
        ]
        if asking:
            query, factor = next((pair for pair in asking if pair[0].is_plain), asking[0])
            return Operands(query, of_key, of_value, factor, roles)
    return None


def read_sides(
    node: Node,
    query: Any,
    key: Any,
    value: Any,
    scale: Any = None,
    grouped: bool = False,
    tokens: int = -2,
) -> Operands | None:
    """The operands of an attention whose call takes them one by one.

    Args:
        scale: the call's. If it is a node, keys may not have a factor.
        grouped: whether there may be fewer heads of keys than of queries.
        tokens: the dimension of tokens; the last one has the elements of a vector.
    """
    axes = Axes()
    sides = (query, key, value)
    if not all(isinstance(side, Node) and len(fx.shape(side)) >= 3 for side in sides):
        return None
    if len({len(fx.shape(side)) for side in sides}) != 1:
        return None
    dims = [axes.new(size) for size in fx.shape(query)]
    shapes = [fx.shape(side) for side in (key, value)]
    heads = [i for i in range(1, len(dims) - 1) if i != tokens % len(dims)]
    if grouped and heads:
        place = heads[-1]
        few, many = shapes[0][place], fx.shape(query)[place]
        if not isinstance(few, int) or not isinstance(many, int) or many % few:
            return None
        groups = axes.regroup([dims[place]], (few, many // few))
        assert groups is not None
        of_keys = groups[0]
    length, of_values = axes.new(shapes[0][tokens]), axes.new(shapes[1][-1])
    steps = [Step(query, dims, 1.0)]
    for side, width in ((key, dims[-1]), (value, of_values)):
        own = broadcast(dims, fx.shape(side))
        if grouped and heads:
            own[place] = of_keys
        own[tokens], own[-1] = length, width
        steps.append(Step(side, own, 1.0))
    lengths = (dims[tokens], length, dims[-1], of_values)
    batch = dims[0] if len(dims) > 3 else None
    found = read_operands(
        node, axes, (steps[0], steps[1], steps[2]), lengths, as_read=True, batch=batch
    )
    if found is not None and found.factor != 1.0 and isinstance(scale, Node):
        return None
    return found


def scale_of(scale: Any, query: Any, factor: float = 1.0) -> Any:
    """What a call multiplies products by: its scale, or D ** -0.5, times a factor."""
    if scale is None and fx.shape(query):
        scale = int(fx.shape(query)[-1]) ** -0.5  # a graph serves one head size
    return scale if factor == 1.0 else scale * factor


def as_given(query: Any, key: Any, value: Any) -> Operands:
    """Operands [B, H, S, D] as they are, if nothing is known about them."""
    return Operands(Arranged(query), Arranged(key), Arranged(value), 1.0, [])


def _same_width(left: Arranged, right: Arranged) -> bool:
    """Whether vectors have the same number of elements, with and without padding."""
    return fx.same(fx.shape(left.computed())[-1], fx.shape(right.computed())[-1])


def _pairs(keys: list[Step], values: list[Step]) -> Iterator[tuple[Step, Step]]:
    """Keys and values that may be the cached ones: what is stored, or else what everything was
    made of."""
    for stored in (True, False):
        for key in keys if stored else reversed(keys):
            for value in values if stored else reversed(values):
                if stored == is_stored(key.node) == is_stored(value.node):
                    yield key, value
    if keys and values:
        yield keys[0], values[0]


def _axes_of(axes: Axes, step: Step, without: Group) -> Group:
    whole = (axis for group in step.dims for axis in axes.whole(group))
    return tuple(axis for axis in whole if axis not in without)


def _merged(axes: Axes, chains: list[list[Step]], some: Collection[int]) -> set[int]:
    """The axes that share a dimension with `some` in a tensor of several dimensions."""
    found: set[int] = set()
    for step in (step for steps in chains for step in steps if len(step.dims) > 1):
        for group in map(axes.whole, step.dims):
            if set(group) & set(some):
                found.update(group)
    return found - set(some)


def _next_to(axes: Axes, steps: list[Step], groups: Group, width: Group) -> set[int]:
    """The axes of the dimension after the KV heads', in [B, G, r, S, D].

    The elements of a vector may take several dimensions, as where rotary positions pair them.
    """
    found: set[int] = set()
    for step in steps:
        dims = [group for group in map(axes.whole, step.dims) if set(group) - set(width)]
        places = [i for i, group in enumerate(dims) if groups and group[-1] == groups[-1]]
        if places and len(dims) > 3:
            found.update(*dims[places[0] + 1 : places[0] + 2])
    return found


def _batch_of(
    axes: Axes, chains: list[list[Step]], shared: Group, merged: set[int]
) -> Group | None:
    """The batch among the axes that queries share with keys; the others are heads.

    What is in one dimension with the elements of a vector is a head. Without such a tensor, the
    first dimension of four is the batch.
    """
    if not shared or merged & set(shared):
        return tuple(axis for axis in shared if axis not in merged)
    for step in (step for steps in chains for step in steps if len(step.dims) >= 4):
        first = axes.whole(step.dims[0])
        if set(first) <= set(shared):
            return first
    return None


def _queries_of(
    dims: list[Group], heads: set[int], masked: Collection[int], first: Group
) -> Group | None:
    """The axes of the queries; None if they cannot be told from heads."""
    if not dims:
        return first
    left = [tuple(axis for axis in group if axis not in heads) for group in dims]
    varied = {axis for group in left for axis in group if axis in masked}
    if len(varied) == 1:
        return tuple(varied)
    if len(left) == 1:
        return left[0] if len(left[0]) < 2 else None
    return next((group for group in reversed(left) if group), ())


def _arranged(axes: Axes, step: Step, roles: Dims) -> Arranged | None:
    """The tensor of a step with one dimension for each role, if it is a permutation and reshape."""
    dims = [axes.whole(group) for group in step.dims]
    left = [axis for role in roles for axis in role]
    unused = list(range(len(dims)))
    order: list[int] = []

    def take(place: int | None) -> None:
        if place is not None:
            unused.remove(place)
            order.append(place)

    for role in roles:
        if not role:
            take(next((i for i in unused if not dims[i]), None))
        while role and left and left[0] in role:
            group = next((dims[i] for i in unused if dims[i] and dims[i][0] == left[0]), ())
            if not group or left[: len(group)] != [*group]:
                return None
            take(dims.index(group))
            left = left[len(group) :]
    if any(dims[i] for i in unused):
        return None
    order += unused
    return Arranged.of_groups(step.node, order, [dims[i] for i in order], roles, axes.size)
