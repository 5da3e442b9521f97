"""Says why attention that is spelled out cannot be read."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from .. import fx, ops
from ..functional import changed
from .logits import PRODUCT, choice_of, number_of, operands_of, reaches_product, read_logits
from .operands import NO_BIAS, NO_VALUES, SDPA_WAY_OUT
from .softmax import input_of, path_to_softmax, softmax_behind, softmax_dim, zeroes_more


def why_not(node: Node) -> str | None:
    """Says what stands between the two products in addition to a scale and masks."""
    if not fx.is_op(node, PRODUCT):
        return None
    for weights in operands_of(node):
        softmax, between = softmax_behind(weights)
        if softmax is None:
            continue
        if not fx.shape(softmax):
            return NO_VALUES
        if softmax_dim(softmax) != -1:
            continue  # over queries, or whatever stands there
        reason = _what_is_in(input_of(softmax), between, path_to_softmax(weights))
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
        if fx.is_op(source, ops.CAT):
            return "the softmax has a sink next to the keys, and scores do not account for it"
        if fx.is_op(source, ops.TANH):
            return "the logits are soft-capped, and scores do not account for that"
        if fx.is_op(source, ops.BADDBMM):
            return f"baddbmm adds a bias to the logits; {NO_BIAS}"
        if fx.is_op(source, PRODUCT):
            break
    else:
        if not reaches_product(logits):
            return None
    readable = read_logits(logits)
    if readable is not None and between is None and path is not None:
        between = next((n for n in path if zeroes_more([n], readable)), None)
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
    if fx.is_op(node, PRODUCT + ops.CAT + ops.TANH + ops.BADDBMM) or node.target is changed:
        return None
    choice = choice_of(node)
    sources = choice[1:] if choice is not None else operands_of(node)[:2]
    tensors = [n for n in sources if isinstance(n, Node) and number_of(n) is None]
    alike = [n for n in tensors if len(fx.shape(n)) >= 3]
    return next((n for n in alike if reaches_product(n)), None) or next(iter(alike), None)
