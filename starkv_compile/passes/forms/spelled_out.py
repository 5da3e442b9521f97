"""product(softmax(product(q, k^T) * scale + mask), v), as people write it and as ATen has it.

This is models' own attention, in Dynamo's graphs and in exported ones: products by matmul, bmm or
einsum, heads folded into the batch or in groups, dimensions in any order. It is also what
decompositions make of scaled_dot_product_attention: the scale's root on queries and on keys, a
softmax that is zero for a query that sees nothing, or a softmax in steps of exp, sum and a
division.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from .. import fx
from ..axes import Axes, Dims, Group, Product, Step
from ..functional import changed, is_intact
from ..sites import HIDDEN, Attention
from .masks import Kind, Mask, combined
from .operands import NO_BIAS, NO_VALUES, SDPA_WAY_OUT, Operands, read_operands

PRODUCT = fx.MATMUL + fx.EINSUM


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
    to_softmax = _path_to_softmax(second.sides[side])
    logits = None if to_softmax is None else _read_logits(_input_of(to_softmax[-1]))
    first = None if logits is None else axes.product(logits.path[-1])
    if to_softmax is None or logits is None or first is None:
        return None
    if _zeroes_more(to_softmax, logits):
        return None
    dims = _dims_after(axes, [*reversed(logits.path), *reversed(to_softmax)], first)
    if dims is None or not _agree(axes, second.dims[side], dims[second.sides[side]]):
        return None
    softmax = to_softmax[-1]
    length = axes.whole(dims[softmax][_softmax_dim(softmax)])
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


def why_not(node: Node) -> str | None:
    """Says what stands between the two products in addition to a scale and masks."""
    if not fx.is_op(node, PRODUCT):
        return None
    for weights in _operands_of(node):
        softmax, between = _softmax_behind(weights)
        if softmax is None:
            continue
        if not fx.shape(softmax):
            return NO_VALUES
        if _softmax_dim(softmax) != -1:
            continue  # over queries, or whatever stands there
        reason = _what_is_in(_input_of(softmax), between, _path_to_softmax(weights))
        if reason is not None:
            return reason
    return None


def _what_is_in(logits: Any, between: Node | None, path: list[Node] | None) -> str | None:
    for source in fx.through(logits, _first_operand):
        if source.target is changed:
            return (
                "the logits are changed in place through another view of them, and scores would "
                f"not account for that; change them by name, or {SDPA_WAY_OUT}"
            )
        if fx.is_op(source, fx.CAT):
            return "the softmax has a sink next to the keys, and scores do not account for it"
        if fx.is_op(source, fx.TANH):
            return "the logits are soft-capped, and scores do not account for that"
        if fx.is_op(source, fx.BADDBMM):
            return f"baddbmm adds a bias to the logits; {NO_BIAS}"
        if fx.is_op(source, PRODUCT):
            break
    else:
        if not _reaches_product(logits):
            return None
    readable = _read_logits(logits)
    if readable is not None and between is None and path is not None:
        between = next((n for n in path if _zeroes_more([n], readable)), None)
    if between is not None:
        return (
            f"the weights are changed between softmax and values ({_called(between)}), and scores "
            f"would not account for that; {SDPA_WAY_OUT}"
        )
    if readable is None:
        return f"the logits are more than a scaled product and masks; {SDPA_WAY_OUT}"
    return (
        "queries, keys and values could not be told apart, or are overwritten before attention "
        f"has read them; {SDPA_WAY_OUT}"
    )


def _called(node: Node) -> str:
    """The operation that a node calls, in words for a reader of the model's code."""
    if node.target is changed:
        return "in place"
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _first_operand(node: Node) -> Node | None:
    """What a tensor was made of by arithmetic, masks, copies and changes of shape."""
    if fx.is_op(node, PRODUCT + fx.CAT + fx.TANH + fx.BADDBMM) or node.target is changed:
        return None
    choice = _choice(node)
    sources = choice[1:] if choice is not None else _operands_of(node)[:2]
    tensors = [n for n in sources if isinstance(n, Node) and _number(n) is None]
    alike = [n for n in tensors if len(fx.shape(n)) >= 3]
    return next((n for n in alike if _reaches_product(n)), None) or next(iter(alike), None)


# --- the softmax


def _path_to_softmax(weights: Any) -> list[Node] | None:
    """The nodes from attention weights back to their softmax."""
    path = list(fx.through(weights, _see_through_weights))
    return path if path and _input_of(path[-1]) is not None else None


def _see_through_weights(node: Node) -> Node | None:
    if _input_of(node) is not None:
        return None
    if fx.is_op(node, fx.DROPOUT):
        return fx.operand(node)
    zeroed = _zeroed(node)
    if zeroed is not None:
        return zeroed[0]
    return _see_through_safety(node) or _unchanged(node)


def _zeroed(node: Node) -> tuple[Node, Node | None, Kind] | None:
    """(weights, mask, kind) of `node`, if it puts zeros into weights where a mask hides a key. None
    for a mask: where weights are NaN, because the query sees nothing."""
    if fx.is_op(node, fx.NAN_TO_NUM):
        args = fx.bind(node, "input", "nan")
        return None if args.get("nan") else (args["input"], None, "hides")
    choice = _choice(node)
    if choice is not None and _is_not_finite(choice[0], choice[2]):
        return choice[2], None, "hides"
    part = _mask_in(node)
    if part is None or part[2] == "adds" or part[3] != 0.0:
        return None
    return part[:3]


def _is_not_finite(condition: Any, weights: Any) -> bool:
    """Whether a condition holds only where weights are NaN or infinite, as in decomposed
    nan_to_num."""
    asked = fx.is_op(condition, fx.IS_NAN) or (
        fx.is_op(condition, fx.EQUAL) and abs(_number(condition.args[1]) or 0.0) == float("inf")
    )
    path = _path_to_softmax(weights)
    return asked and path is not None and fx.operand(condition) in path


def _zeroes_more(path: list[Node], logits: _Logits) -> bool:
    """Whether weights are zero somewhere because of another mask than those of the logits."""
    known = {(mask.node, mask.kind) for mask in logits.masks} | {(None, "hides")}
    zeroed = (_zeroed(node) for node in path if _see_through_safety(node) is None)
    return any(found is not None and found[1:] not in known for found in zeroed)


def _unchanged(node: Node) -> Node | None:
    """The source of a copy, or of a change of shape that has all elements."""
    found = fx.see_through_copies(node) or fx.see_through_overwriting(node)
    if found is None and (fx.order_of_dims(node) or fx.is_op(node, _SHAPES)):
        found = fx.operand(node)
    return found


_SHAPES = fx.RESHAPE + fx.UNSQUEEZE + fx.EXPAND + fx.SLICE


def _see_through_safety(node: Node) -> Node | None:
    """The softmax in `where(sees nothing, 0, softmax)`: such a query does not vote anyway."""
    choice = _choice(node)
    if choice is None:
        return None
    condition, zeros, softmax = choice
    logits = _input_of(softmax)
    if logits is None or _number(zeros) != 0:
        return None
    of_logits = logits in fx.through(condition, lambda n: next(iter(fx.producers(n)), None))
    return softmax if of_logits and isinstance(softmax, Node) else None


def _softmax_behind(weights: Any) -> tuple[Node | None, Node | None]:
    """(the softmax, what changes the weights after it) of weights that need not be readable."""
    queue: list[tuple[Any, Node | None]] = [(weights, None)]
    known: set[Node] = set()
    while queue:
        node, between = queue.pop()
        if not isinstance(node, Node) or node in known or len(fx.shape(node)) == 1:
            continue
        known.add(node)
        if _input_of(node) is not None:
            return node, between
        passed = _see_through_weights(node)
        if passed is not None:
            queue.append((passed, between))
        elif fx.is_op(node, _ARITHMETIC + fx.WHERE):
            queue += [(source, between or node) for source in reversed(fx.producers(node))]
    return None, None


_ARITHMETIC: tuple[Any, ...] = (*fx.ADD, *fx.SUBTRACT, *fx.MULTIPLY, *fx.DIVIDE, changed)
_ARITHMETIC += fx.MASKED_FILL
_ARITHMETIC += fx.INDEX_PUT + fx.SET_ITEM + fx.NAN_TO_NUM + fx.SLICE_SCATTER + fx.SELECT_SCATTER


def _input_of(softmax: Any) -> Node | None:
    """x, if the node is softmax(x), in one call or in steps."""
    if fx.is_op(softmax, fx.SOFTMAX):
        x = fx.operand(softmax)
        return x if _softmax_dim(softmax) is not None and isinstance(x, Node) else None
    sides = fx.operands(softmax) if fx.is_op(softmax, fx.DIVIDE) else None
    if sides is None or not fx.is_op(sides[0], fx.EXP):
        return None
    exponential, total = sides
    if not fx.is_op(total, fx.SUM) or fx.operand(total) is not exponential or not _is_a_row(total):
        return None
    inner: Node = fx.operand(exponential)
    sides = fx.operands(inner) if fx.is_op(inner, fx.SUBTRACT) else None
    if sides is not None and _is_a_row(sides[1]):
        return sides[0]  # the same for every key, the largest logit as a rule
    return inner


def _softmax_dim(softmax: Node) -> Any:
    """The dimension that a softmax is over, from the last one; None if it has none."""
    if not fx.is_op(softmax, fx.SOFTMAX):
        return -1
    dim, rank = fx.bind(softmax, "input", "dim").get("dim"), len(fx.shape(softmax))
    if not isinstance(dim, int):
        return None
    return dim - rank if dim >= 0 else dim


def _is_a_row(node: Any) -> bool:
    """Whether a query has one number for all its keys."""
    dims = fx.shape(node)
    return bool(dims) and isinstance(dims[-1], int) and dims[-1] == 1


# --- the logits


class _Logits(NamedTuple):
    """path: the nodes from the softmax back to the product; scale: of the product; masks: in the
    order in which they come into it."""

    path: list[Node]
    scale: float
    masks: list[Mask]


def _read_logits(node: Any) -> _Logits | None:
    """None if there is more in them than a product, scales and masks."""
    scale, masks, path = 1.0, list[Mask](), list[Node]()
    while isinstance(node, Node):
        path.append(node)
        if fx.is_op(node, PRODUCT):
            return _Logits(path, scale, masks[::-1])
        scaled, parts = fx.scaled(node), _mask_in(node)
        if parts is not None:
            node_before, mask, kind, number = parts
            if kind != "adds" and not number * scale <= HIDDEN:
                return None  # so little that it hides nothing
            factor = number * scale if kind == "adds" else 1.0
            if not isinstance(fx.value(mask), torch.Tensor):
                return None
            masks.append(Mask(mask, kind, factor, node))
            node = node_before
        elif scaled is not None:
            node, scale = scaled[0], scale * scaled[1]
        else:
            node = _unchanged(node)
    return None


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


Part = tuple[Node, Node, Kind, float]
"""(logits, mask, kind, what an added mask is multiplied by or the number that hides)."""


def _mask_in(node: Node) -> Part | None:
    """The logits and the mask of `node`, if a mask comes in there."""
    if fx.is_op(node, fx.MASKED_FILL):
        args = fx.bind(node, "input", "mask", "value")
        return _hidden(args["input"], args["mask"], args["value"], "hides")
    if fx.is_op(node, fx.INDEX_PUT + fx.SET_ITEM):
        return _hidden_by_index(node)
    if (choice := _choice(node)) is not None:
        condition, left, right = choice
        shown = _hidden(left, condition, right, "shows")
        return shown or _hidden(right, condition, left, "hides")
    sides = fx.operands(node) if fx.is_op(node, fx.ADD + fx.SUBTRACT) else None
    if sides is None:
        return None
    left, right = sides
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    minus = fx.is_op(node, fx.SUBTRACT)
    of_left, of_right = _reaches_product(left), _reaches_product(right)
    if of_left == of_right or (minus and of_right):
        return None
    logits, mask = (left, right) if of_left else (right, left)
    sign = -1.0 if minus else 1.0
    return _shown_by_product(logits, mask, sign) or (logits, mask, "adds", sign)


def _shown_by_product(logits: Node, mask: Node, sign: float) -> Part | None:
    """x * shown - 1e10 * (1 - shown), as in GPT-2: hides all that is not 1."""
    sides = fx.operands(logits) if fx.is_op(logits, fx.MULTIPLY) else None
    scaled = fx.scaled(mask)
    if sides is None or scaled is None or not scaled[1] * sign <= HIDDEN:
        return None
    hidden = scaled[0]
    terms = fx.operands(hidden) if fx.is_op(hidden, fx.SUBTRACT + fx.REVERSE_SUBTRACT) else None
    if terms is None:
        return None
    one, shown = terms if fx.is_op(hidden, fx.SUBTRACT) else terms[::-1]
    if _number(one) != 1.0 or not isinstance(shown, Node):
        return None
    for x, factor in (sides, sides[::-1]):
        if factor is shown and isinstance(x, Node) and x is not shown:
            return x, mask, "adds", sign
    return None


def _hidden_by_index(node: Node) -> Part | None:
    """x[..., mask] = low, where the mask is over the last dimensions."""
    x, index, number = node.args[:3] if len(node.args) >= 3 else (None, None, None)
    entries = list(index) if isinstance(index, (tuple, list)) else [index]
    if node.kwargs or (len(node.args) > 3 and node.args[3]):
        return None  # accumulates
    rank, mask = len(fx.shape(x)), entries[-1]
    value = fx.value(mask)
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        return None
    if not all(entry in (None, ...) or entry == slice(None) for entry in entries[:-1]):
        return None
    is_set = fx.is_op(node, fx.SET_ITEM)
    if is_set and None in entries:  # a new dimension; index_put means all of one by it
        return None
    if ... not in entries and len(entries) - 1 + value.dim() != rank:
        return None
    return _hidden(x, mask, number, "hides")


def _choice(node: Node) -> tuple[Any, Any, Any] | None:
    """(condition, value where it holds, value elsewhere) of `node`, if it chooses."""
    if not fx.is_op(node, fx.WHERE):
        return None
    method = node.op == "call_method"  # x.where(condition, other)
    names = ("input", "condition", "other") if method else ("condition", "input", "other")
    args = fx.bind(node, *names)
    complete = set(args) == set(names)
    return (args["condition"], args["input"], args["other"]) if complete else None


def _hidden(logits: Any, mask: Any, filler: Any, kind: Kind) -> Part | None:
    value = _number(filler)
    if value is None or value > 0.0 or not isinstance(logits, Node) or not isinstance(mask, Node):
        return None
    return logits, mask, kind, value


def _reaches_product(node: Any) -> bool:
    """Whether `node` is a product with scales and masks."""
    queue, known = [node], set()
    while queue:
        node = queue.pop()
        if not isinstance(node, Node) or node in known or len(fx.shape(node)) < 3:
            continue
        known.add(node)
        if fx.is_op(node, PRODUCT + fx.BADDBMM):
            return True
        if (choice := _choice(node)) is not None:
            queue += choice[1:]
        elif fx.is_op(node, _ARITHMETIC + fx.TANH):
            queue += _operands_of(node)[:2]
        else:
            queue.append(_unchanged(node))
    return False


def _operands_of(node: Node) -> list[Node]:
    """The tensors that a call works on, in the order of its arguments."""
    return list(node.all_input_nodes)


def _number(node: Any) -> float | None:
    """The number itself, or the one that every element of a tensor is."""
    source = next(reversed(list(fx.through(node, fx.see_through_copies))), node)
    if fx.is_op(source, fx.FULL):
        if "zeros" in str(source.target):
            return 0.0
        given = source.args[0 if fx.is_op(source, fx.SCALAR) else 1 :]
        given = given or (source.kwargs.get("fill_value"),)
        return _number(given[0])
    if isinstance(source, Node) and source.op == "get_attr":
        return _constant(source)
    return float(source) if isinstance(source, (int, float)) else None


def _constant(node: Node) -> float | None:
    """The number in a constant that export has lifted."""
    owner = node.graph.owning_module
    tensor: Any = owner
    for name in str(node.target).split("."):
        tensor = getattr(tensor, name, None)
    single = isinstance(tensor, torch.Tensor) and tensor.numel() == 1
    fixed = single and type(tensor) is torch.Tensor and not tensor.requires_grad
    return float(tensor) if fixed and "tensor" in str(node.target) else None
