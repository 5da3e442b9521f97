"""One mask made of all that is added to logits, and of all that hides some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch.fx import Node

from .. import fx
from ..axes import Axes, Dims
from ..sites import Computed

Kind = Literal["adds", "hides", "shows"]


class Mask(NamedTuple):
    """A mask that comes into the logits.

    kind: whether it is added, or True where keys are hidden, or True where they are visible.
    factor: what it is multiplied by before the softmax, if it is added. at: the logits after it.
    """

    node: Node
    kind: Kind
    factor: float
    at: Node


def combined(
    axes: Axes, roles: Dims, masks: list[Mask], dims: dict[Node, Dims]
) -> tuple[Node | Computed | None, bool] | None:
    """(one mask that broadcasts to [B, H, S, L], whether it is True where keys are hidden).

    None if the logits have an order of dimensions that no mask can be brought into.

    Args:
        roles: the groups of B, H, S and L.
        dims: of the logits at each node.
    """
    masks = [mask for mask in masks if not _moves_rows(mask)]
    if not masks:
        return None, False
    orders = [_to_roles(axes, roles, dims[mask.at], fx.shape(mask.node)) for mask in masks]
    if None in orders:
        return None
    first = masks[0]
    is_bool = fx.value(first.node).dtype == torch.bool
    as_it_is = first.factor == 1.0 and is_bool == (first.kind != "adds")
    if len(masks) == 1 and as_it_is and orders[0] is _unchanged:
        return first.node, first.kind == "hides"

    def make(*tensors: Any) -> Any:
        visible, bias = None, None
        for mask, order, tensor in zip(masks, orders, tensors, strict=True):
            assert order is not None
            ordered = order(tensor)
            if mask.kind == "adds":
                term = ordered.float() * mask.factor
                bias = term if bias is None else bias + term
                continue
            seen = torch.logical_not(ordered) if mask.kind == "hides" else ordered
            visible = seen if visible is None else torch.logical_and(visible, seen)
        if bias is None or visible is None:
            return visible if bias is None else bias
        return torch.where(visible, bias, bias.new_full((), float("-inf")))

    return Computed(make, tuple(mask.node for mask in masks)), False


def _moves_rows(mask: Mask) -> bool:
    """Whether a mask adds the same to all keys of a query, which no softmax notices."""
    sizes = fx.shape(mask.node)
    return mask.kind == "adds" and (not sizes or (isinstance(sizes[-1], int) and sizes[-1] == 1))


def _unchanged(tensor: Any) -> Any:
    return tensor


def _to_roles(axes: Axes, roles: Dims, dims: Dims, sizes: Any) -> Callable[[Any], Any] | None:
    """What brings a mask of logits with these dimensions to one that broadcasts to [B, H, S, L]."""
    groups = [axes.whole(group) for group in dims]
    wanted = [axes.whole(role) for role in roles]
    missing = len(groups) - len(sizes)
    if missing < 0:
        return None
    full = (*(1 for _ in range(missing)), *sizes)
    alike = [i for i, n in enumerate(full) if not (isinstance(n, int) and n == 1)]
    own = [groups[i] for i in alike]
    by_role: list[list[int]] = [[] for _ in wanted]  # which dimensions are each role's
    folded = None
    for i, group in zip(alike, own, strict=True):
        if not group:
            return None  # a mask that makes the logits longer
        role = next((r for r, axis in enumerate(wanted) if set(group) <= set(axis)), None)
        if role is None and group == (*wanted[0], *wanted[1]):
            folded, role = i, 0
        if role is None:
            return None
        by_role[role].append(i)
    if not by_role[3] or any(len(by_role[role]) > 1 for role in (0, 2, 3)):
        return None
    in_place = all(p in ([], [r + len(full) - 4]) for r, p in enumerate(by_role))
    if in_place and folded is None and len(full) <= 4 and groups == wanted[4 - len(groups) :]:
        return _unchanged
    heads = [i for i, group in enumerate(groups) if group and set(group) <= set(wanted[1])]
    if [axis for i in heads for axis in groups[i]] != [*wanted[1]] and by_role[1]:
        return None
    number = axes.size(wanted[1])
    if not isinstance(number, int):
        return None
    each = [axes.size(groups[i]) for i in heads]

    def order(tensor: Any) -> Any:
        tensor = tensor[(None,) * missing] if missing else tensor
        if by_role[1]:
            grown = [-1] * len(full)
            for place, size in zip(heads, each, strict=True):
                grown[place] = size
            tensor = tensor.expand(*grown)
        batch, asked, length = (by_role[role] for role in (0, 2, 3))
        middle = heads if by_role[1] else []
        used = [*batch, *middle, *asked, *length]
        tensor = tensor.permute(*(i for i in range(len(full)) if i not in used), *used)
        shape: list[Any] = [tensor.shape[len(full) - len(used)] if batch else 1]
        shape += [number if middle else 1]
        shape += [tensor.shape[-1 - len(length)] if asked else 1]
        shape += [tensor.shape[-1] if length else 1]
        if folded is not None:
            shape[:2] = [-1, number]
        return tensor.reshape(*shape)

    return order
