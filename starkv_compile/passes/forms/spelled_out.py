"""matmul(softmax(matmul(q, k^T) * scale + mask), v), as people write it and as ATen has it.

This is models' own attention, in Dynamo's graphs and in exported ones. It is also what
decompositions make of scaled_dot_product_attention: the scale's root on queries and on keys, heads
folded into the batch, a softmax that is zero for a query that sees nothing, or a softmax in steps
of exp, sum and a division.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.fx import Node

from .. import fx
from ..sites import HIDDEN, Attention
from .operands import NO_BIAS, NO_VALUES, SDPA_WAY_OUT, steps_behind


def read(node: Node) -> Attention | None:
    """`node` as an attention if it is the second product. Its mask says what is hidden."""
    factors = fx.operands(node) if fx.is_op(node, fx.MATMUL) else None
    if factors is None:
        return None
    softmax = _softmax_behind(factors[0])
    logits = None if softmax is None else _read_logits(_input_of(softmax))
    of_logits = None if logits is None else fx.operands(logits.product)
    if logits is None or of_logits is None:
        return None
    queries = [step for step in steps_behind(of_logits[0]) if _is_4d(step, False)]
    keys = [step for step in steps_behind(of_logits[1]) if _is_4d(step, True)]
    values = [step.node for step in steps_behind(factors[1]) if step[1:] == (1.0, False)]
    if not queries or not keys:
        return None
    query = queries[-1]
    key = fx.cached_of([step.node for step in keys])
    value = fx.cached_of(values)
    if not fx.agree(("BHSD", query.node), ("BGLD", key), ("BGLE", value)):
        return None
    if logits.masked is not None and not fx.agree(("BHSD", query.node), ("BHSL", logits.masked)):
        return None
    factor = next(step.factor for step in keys if step.node is key)
    return Attention(
        node=node,
        form="spelled out",
        query=query.node,
        key=key,
        value=value,
        mask=logits.mask,
        causal=False,
        scale=logits.scale * query.factor * factor,
        mask_hides=logits.hides,
    )


def why_not(node: Node) -> str | None:
    """Says what stands between the two products in addition to a scale and a mask."""
    if not fx.is_op(node, fx.MATMUL):
        return None
    softmax = _softmax_behind(fx.operand(node))
    if softmax is None:
        return None
    if not fx.shape(softmax):
        return NO_VALUES
    steps = (_first_operand, fx.see_through_copies, fx.see_through_folding)
    for source in fx.through(_input_of(softmax), *steps):
        if fx.is_op(source, fx.CAT):
            return "the softmax has a sink next to the keys, and scores do not account for it"
        if fx.is_op(source, fx.TANH):
            return "the logits are soft-capped, and scores do not account for that"
        if fx.is_op(source, fx.BADDBMM):
            return f"baddbmm adds a bias to the logits; {NO_BIAS}"
        if fx.is_op(source, fx.MATMUL):
            return f"the logits are more than a scaled product and a mask; {SDPA_WAY_OUT}"
    return None


def _is_4d(step: Any, swapped: bool) -> bool:
    return step.swapped is swapped and len(fx.shape(step.node)) == 4


def _first_operand(node: Node) -> Node | None:
    """The first operand of a sum, a product and the like."""
    arithmetic = fx.ADD + fx.SUBTRACT + fx.MULTIPLY + fx.DIVIDE + fx.IN_PLACE
    first = None
    if fx.is_op(node, arithmetic + fx.MASKED_FILL):
        first = fx.operand(node)
    elif (choice := _choice(node)) is not None:
        first = next((n for n in choice[1:] if _filled_with(n) is None), None)
    return first if isinstance(first, Node) else None


# --- the softmax


def _softmax_behind(weights: Any) -> Node | None:
    """The softmax behind attention weights, if it is one over the keys."""
    chain = list(
        fx.through(weights, _see_through_weights, fx.see_through_copies, fx.see_through_folding)
    )
    return chain[-1] if chain and _input_of(chain[-1]) is not None else None


def _see_through_weights(node: Node) -> Node | None:
    if fx.is_op(node, fx.DROPOUT + fx.SLICE):
        return fx.operand(node)
    return _see_through_safety(node)


def _see_through_safety(node: Node) -> Node | None:
    """The softmax in `where(sees nothing, 0, softmax)`: such a query does not vote anyway."""
    choice = _choice(node)
    if choice is None:
        return None
    condition, zeros, softmax = choice
    logits = _input_of(softmax)
    if logits is None or _filled_with(zeros) != 0:
        return None
    of_logits = logits in fx.through(condition, lambda n: next(iter(fx.producers(n)), None))
    return softmax if of_logits and isinstance(softmax, Node) else None


def _input_of(softmax: Any) -> Node | None:
    """x, if the node is softmax(x) over the last dimension, in one call or in steps."""
    if fx.is_op(softmax, fx.SOFTMAX):
        args = fx.bind(softmax, "input", "dim")
        dim = args.get("dim")
        last = isinstance(dim, int) and dim in (-1, len(fx.shape(softmax)) - 1)
        return args["input"] if last else None
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


def _is_a_row(node: Any) -> bool:
    """Whether a query has one number for all its keys."""
    dims = fx.shape(node)
    return bool(dims) and isinstance(dims[-1], int) and dims[-1] == 1


# --- the logits


class _Logits(NamedTuple):
    """product * scale, then what `masked`, the node at which `mask` comes in, adds or hides."""

    product: Node
    scale: float
    mask: Node | None
    hides: bool
    masked: Node | None


def _read_logits(node: Any) -> _Logits | None:
    """None if there is more in them than a product, a scale and then a mask."""
    scale, mask, hides, masked = 1.0, None, False, None
    while isinstance(node, Node) and not fx.is_op(node, fx.MATMUL):
        scaled, parts = fx.scaled(node), _mask_in(node)
        if parts is not None:
            if mask is not None or scale != 1.0:
                return None
            masked, (node, mask, hides) = node, parts
        elif scaled is not None:
            node, scale = scaled[0], scale * scaled[1]
        else:
            node = fx.see_through_copies(node) or fx.see_through_folding(node)
    return _Logits(node, scale, mask, hides, masked) if isinstance(node, Node) else None


def _mask_in(node: Node) -> tuple[Node, Node, bool] | None:
    """(logits, mask, whether it is True where hidden) of `node`, if a mask comes in there."""
    if fx.is_op(node, fx.MASKED_FILL):
        args = fx.bind(node, "input", "mask", "value")
        return _where(args["input"], args["mask"], args["value"], True)
    if (choice := _choice(node)) is not None:
        condition, left, right = choice
        return _where(left, condition, right, False) or _where(right, condition, left, True)
    sides = fx.operands(node) if fx.is_op(node, fx.ADD) else None
    if sides is None:
        return None
    left, right = sides
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    return (right, left, False) if _is_scaled_product(right) else (left, right, False)


def _choice(node: Node) -> tuple[Any, Any, Any] | None:
    """(condition, value where it holds, value elsewhere) of `node`, if it chooses."""
    if not fx.is_op(node, fx.WHERE):
        return None
    method = node.op == "call_method"  # x.where(condition, other)
    names = ("input", "condition", "other") if method else ("condition", "input", "other")
    args = fx.bind(node, *names)
    complete = set(args) == set(names)
    return (args["condition"], args["input"], args["other"]) if complete else None


def _where(logits: Any, mask: Any, filler: Any, hides: bool) -> tuple[Node, Node, bool] | None:
    value = _filled_with(filler)
    if value is None or value > HIDDEN or not isinstance(logits, Node):
        return None
    return logits, mask, hides


def _is_scaled_product(node: Node) -> bool:
    return any(fx.is_op(step.node, fx.MATMUL) for step in steps_behind(node))


def _filled_with(node: Any) -> float | None:
    """The number itself, or the one that every element of a tensor is."""
    if fx.is_op(node, fx.FULL):
        if "zeros" in str(node.target):
            return 0.0
        position = 0 if node.target is fx.aten.scalar_tensor.default else 1
        node = node.args[position] if len(node.args) > position else node.kwargs.get("fill_value")
    return float(node) if isinstance(node, (int, float)) else None
