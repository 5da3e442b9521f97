"""Reads logits that are spelled out: a product, what it is multiplied by, and masks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node

from .. import fx, ops
from ..functional import changed
from ..sites import HIDDEN
from .masks import Kind, Mask

PRODUCT = ops.MATMUL + ops.EINSUM
ARITHMETIC: tuple[Any, ...] = (
    *ops.ADD,
    *ops.SUBTRACT,
    *ops.MULTIPLY,
    *ops.DIVIDE,
    changed,
)
ARITHMETIC += ops.MASKED_FILL
ARITHMETIC += ops.INDEX_PUT + ops.SET_ITEM + ops.NAN_TO_NUM + ops.SLICE_SCATTER + ops.SELECT_SCATTER
_SHAPES = ops.RESHAPE + ops.UNSQUEEZE + ops.EXPAND + ops.SLICE


class Logits(NamedTuple):
    """path: the nodes from the softmax back to the product; scale: of the product; masks: in the
    order in which they come into it."""

    path: list[Node]
    scale: float
    masks: list[Mask]


def read_logits(node: Any) -> Logits | None:
    """None if there is more in them than a product, scales and masks."""
    scale, masks, path = 1.0, list[Mask](), list[Node]()
    while isinstance(node, Node):
        path.append(node)
        if fx.is_op(node, PRODUCT):
            return Logits(path, scale, masks[::-1])
        scaled, parts = fx.scaled(node), mask_in(node)
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
            node = unchanged(node)
    return None


Part = tuple[Node, Node, Kind, float]
"""(logits, mask, kind, what an added mask is multiplied by or the number that hides)."""


def mask_in(node: Node) -> Part | None:
    """The logits and the mask of `node`, if a mask comes in there."""
    if fx.is_op(node, ops.MASKED_FILL):
        args = fx.bind(node, "input", "mask", "value")
        return _hidden(args["input"], args["mask"], args["value"], "hides")
    if fx.is_op(node, ops.INDEX_PUT + ops.SET_ITEM):
        return _hidden_by_index(node)
    if (choice := choice_of(node)) is not None:
        condition, left, right = choice
        shown = _hidden(left, condition, right, "shows")
        return shown or _hidden(right, condition, left, "hides")
    sides = fx.operands(node) if fx.is_op(node, ops.ADD + ops.SUBTRACT) else None
    if sides is None:
        return None
    left, right = sides
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    minus = fx.is_op(node, ops.SUBTRACT)
    of_left, of_right = reaches_product(left), reaches_product(right)
    if of_left == of_right or (minus and of_right):
        return None
    logits, mask = (left, right) if of_left else (right, left)
    sign = -1.0 if minus else 1.0
    return _shown_by_product(logits, mask, sign) or (logits, mask, "adds", sign)


def _shown_by_product(logits: Node, mask: Node, sign: float) -> Part | None:
    """x * shown - 1e10 * (1 - shown), as in GPT-2: hides all that is not 1."""
    sides = fx.operands(logits) if fx.is_op(logits, ops.MULTIPLY) else None
    scaled = fx.scaled(mask)
    if sides is None or scaled is None or not scaled[1] * sign <= HIDDEN:
        return None
    hidden = scaled[0]
    terms = fx.operands(hidden) if fx.is_op(hidden, ops.SUBTRACT + ops.REVERSE_SUBTRACT) else None
    if terms is None:
        return None
    one, shown = terms if fx.is_op(hidden, ops.SUBTRACT) else terms[::-1]
    if number_of(one) != 1.0 or not isinstance(shown, Node):
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
    is_set = fx.is_op(node, ops.SET_ITEM)
    if is_set and None in entries:  # a new dimension; index_put means all of one by it
        return None
    if ... not in entries and len(entries) - 1 + value.dim() != rank:
        return None
    return _hidden(x, mask, number, "hides")


def choice_of(node: Node) -> tuple[Any, Any, Any] | None:
    """(condition, value where it holds, value elsewhere) of `node`, if it chooses."""
    if not fx.is_op(node, ops.WHERE):
        return None
    method = node.op == "call_method"  # x.where(condition, other)
    names = ("input", "condition", "other") if method else ("condition", "input", "other")
    args = fx.bind(node, *names)
    complete = set(args) == set(names)
    return (args["condition"], args["input"], args["other"]) if complete else None


def _hidden(logits: Any, mask: Any, filler: Any, kind: Kind) -> Part | None:
    value = number_of(filler)
    if value is None or value > 0.0 or not isinstance(logits, Node) or not isinstance(mask, Node):
        return None
    return logits, mask, kind, value


def reaches_product(node: Any) -> bool:
    """Whether `node` is a product with scales and masks."""
    queue, known = [node], set()
    while queue:
        node = queue.pop()
        if not isinstance(node, Node) or node in known or len(fx.shape(node)) < 3:
            continue
        known.add(node)
        if fx.is_op(node, PRODUCT + ops.BADDBMM):
            return True
        if (choice := choice_of(node)) is not None:
            queue += choice[1:]
        elif fx.is_op(node, ARITHMETIC + ops.TANH):
            queue += operands_of(node)[:2]
        else:
            queue.append(unchanged(node))
    return False


def operands_of(node: Node) -> list[Node]:
    """The tensors that a call works on, in the order of its arguments."""
    return list(node.all_input_nodes)


def unchanged(node: Node) -> Node | None:
    """The source of a copy, or of a change of shape that has all elements."""
    found = fx.see_through_copies(node) or fx.see_through_overwriting(node)
    if found is None and (fx.order_of_dims(node) or fx.is_op(node, _SHAPES)):
        found = fx.operand(node)
    return found


def number_of(node: Any) -> float | None:
    """The number itself, or the one that every element of a tensor is."""
    source = next(reversed(list(fx.through(node, fx.see_through_copies))), node)
    if fx.is_op(source, ops.FULL):
        if "zeros" in str(source.target):
            return 0.0
        given = source.args[0 if fx.is_op(source, ops.SCALAR) else 1 :]
        given = given or (source.kwargs.get("fill_value"),)
        return number_of(given[0])
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
