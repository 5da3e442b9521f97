"""Reads attention weights that are spelled out, back to their softmax."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from .. import fx, ops
from .logits import ARITHMETIC, Logits, choice_of, mask_in, number_of, unchanged
from .masks import Kind


def path_to_softmax(weights: Any) -> list[Node] | None:
    """The nodes from attention weights back to their softmax."""
    path = list(fx.through(weights, _see_through_weights))
    return path if path and input_of(path[-1]) is not None else None


def _see_through_weights(node: Node) -> Node | None:
    if input_of(node) is not None:
        return None
    if fx.is_op(node, ops.DROPOUT):
        return fx.operand(node)
    zeroed = _zeroed(node)
    if zeroed is not None:
        return zeroed[0]
    return _see_through_safety(node) or unchanged(node)


def _zeroed(node: Node) -> tuple[Node, Node | None, Kind] | None:
    """(weights, mask, kind) of `node`, if it puts zeros into weights where a mask hides a key. None
    for a mask: where weights are NaN, because the query sees nothing."""
    if fx.is_op(node, ops.NAN_TO_NUM):
        args = fx.bind(node, "input", "nan")
        return None if args.get("nan") else (args["input"], None, "hides")
    choice = choice_of(node)
    if choice is not None and _is_not_finite(choice[0], choice[2]):
        return choice[2], None, "hides"
    part = mask_in(node)
    if part is None or part[2] == "adds" or part[3] != 0.0:
        return None
    return part[:3]


def _is_not_finite(condition: Any, weights: Any) -> bool:
    """Whether a condition holds only where weights are NaN or infinite, as in decomposed
    nan_to_num."""
    asked = fx.is_op(condition, ops.IS_NAN) or (
        fx.is_op(condition, ops.EQUAL) and abs(number_of(condition.args[1]) or 0.0) == float("inf")
    )
    path = path_to_softmax(weights)
    return asked and path is not None and fx.operand(condition) in path


def zeroes_more(path: list[Node], logits: Logits) -> bool:
    """Whether weights are zero somewhere because of another mask than those of the logits."""
    known = {(mask.node, mask.kind) for mask in logits.masks} | {(None, "hides")}
    zeroed = (_zeroed(node) for node in path if _see_through_safety(node) is None)
    return any(found is not None and found[1:] not in known for found in zeroed)


def _see_through_safety(node: Node) -> Node | None:
    """The softmax in `where(sees nothing, 0, softmax)`: such a query does not vote anyway."""
    choice = choice_of(node)
    if choice is None:
        return None
    condition, zeros, softmax = choice
    logits = input_of(softmax)
    if logits is None or number_of(zeros) != 0:
        return None
    of_logits = logits in fx.through(condition, lambda n: next(iter(fx.producers(n)), None))
    return softmax if of_logits and isinstance(softmax, Node) else None


def softmax_behind(weights: Any) -> tuple[Node | None, Node | None]:
    """(the softmax, what changes the weights after it) of weights that need not be readable."""
    queue: list[tuple[Any, Node | None]] = [(weights, None)]
    known: set[Node] = set()
    while queue:
        node, between = queue.pop()
        if not isinstance(node, Node) or node in known or len(fx.shape(node)) == 1:
            continue
        known.add(node)
        if input_of(node) is not None:
            return node, between
        passed = _see_through_weights(node)
        if passed is not None:
            queue.append((passed, between))
        elif fx.is_op(node, ARITHMETIC + ops.WHERE) or fx.is_pointwise(node):
            queue += [(source, between or node) for source in reversed(fx.producers(node))]
    return None, None


def input_of(softmax: Any) -> Node | None:
    """x, if the node is softmax(x), in one call or in steps."""
    if fx.is_op(softmax, ops.SOFTMAX):
        x = fx.operand(softmax)
        return x if softmax_dim(softmax) is not None and isinstance(x, Node) else None
    sides = fx.operands(softmax) if fx.is_op(softmax, ops.DIVIDE) else None
    if sides is None or not fx.is_op(sides[0], ops.EXP):
        return None
    exponential, total = sides
    if not fx.is_op(total, ops.SUM) or fx.operand(total) is not exponential or not _is_a_row(total):
        return None
    inner: Node = fx.operand(exponential)
    sides = fx.operands(inner) if fx.is_op(inner, ops.SUBTRACT) else None
    if sides is not None and _is_a_row(sides[1]):
        return sides[0]  # the same for every key, the largest logit as a rule
    return inner


def softmax_dim(softmax: Node) -> Any:
    """The dimension that a softmax is over, from the last one; None if it has none."""
    if not fx.is_op(softmax, ops.SOFTMAX):
        return -1
    dim, rank = fx.bind(softmax, "input", "dim").get("dim"), len(fx.shape(softmax))
    if not isinstance(dim, int):
        return None
    return dim - rank if dim >= 0 else dim


def _is_a_row(node: Any) -> bool:
    """Whether a query has one number for all its keys."""
    dims = fx.shape(node)
    return bool(dims) and isinstance(dims[-1], int) and dims[-1] == 1
