"""Attention of a few queries over tokens of which the oldest are stored in few bits.

A stored key is `turn(low + step * codes) + centre`, and `turn` is a rotation, its own inverse. So

    query . key = low * sum(turn(query)) + step * (turn(query) . codes) + query . centre

and the codes of a token are multiplied as they are, once its query is turned. Values are turned
back when they are summed, not token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .quantization import Quantized, turn, unpacked

Tensor = torch.Tensor

LEAST = torch.finfo(torch.float32).min
"""No larger number counts as the largest logit, so that rows that see nothing sum to 0."""


class Sums(NamedTuple):
    """What attention has summed over some of the tokens. Those of other tokens can be added.

    weighted: [B, G, R, D] float32, values times e^(logit - top). total: [B, G, R, 1], the sum of
    these factors. top: [B, G, R, 1], the largest logit.
    """

    weighted: Tensor
    total: Tensor
    top: Tensor


def quantized_attention(
    query: Tensor,
    key: Quantized,
    value: Quantized,
    newer_key: Tensor,
    newer_value: Tensor,
    mask: Tensor | None,
    scale: float,
    attend: Callable[..., Sums] | None = None,
) -> Tensor:
    """Softmax attention over C tokens in few bits, followed by N in the model's precision.

    Args:
        query: [B, H, S, D], positions already encoded.
        key: C tokens of G heads, D numbers each.
        value: as well, E numbers each.
        newer_key: [B, G, N, D].
        newer_value: [B, G, N, E].
        mask: None if every query sees every token; or [B|1, 1|H, S|1, C + N], bool (True =
            visible) or additive.
        scale: what the model multiplies QK^T by.
        attend: computes `attend_codes` in another way.

    Returns:
        [B, H, S, E], of the query's dtype.
    """
    batch, heads, queries, _ = query.shape
    groups, coded = newer_key.shape[1], key.tokens
    # The query heads of a KV head are rows of one product.
    rows = query.float().reshape(batch, groups, heads // groups * queries, -1) * scale
    added = None if mask is None else added_by(mask, groups, heads, queries)
    older = (attend or attend_codes)(
        turn(rows),
        rows @ key.centre.mT,
        key,
        value,
        None if added is None else added[..., :coded],
    )
    older = older._replace(weighted=turn(older.weighted) + older.total * value.centre)
    logits = rows @ newer_key.float().mT
    newer = _sums(logits if added is None else logits + added[..., coded:], newer_value.float())
    top = torch.maximum(older.top, newer.top)
    first, second = (older.top - top).exp(), (newer.top - top).exp()
    out = older.weighted * first + newer.weighted * second
    total = older.total * first + newer.total * second
    out = out / total.where(total != 0, 1.0)  # 0 for a query that sees nothing, as in SDPA
    return out.reshape(batch, heads, queries, -1).to(query.dtype)


def attend_codes(
    rows: Tensor, base: Tensor, key: Quantized, value: Quantized, added: Tensor | None
) -> Sums:
    """Attention over the codes alone, of rows [B, G, R, D] float32, turned and scaled.

    Args:
        base: [B, G, R, 1] float32, what is added to all logits of a row.
        added: [B|1, G|1, R|1, C] float32, what a mask adds to each logit.

    Returns:
        The sums, with values that are still turned and without their centre.
    """
    low, step = key.ranges.float().mT[:, :, :, None].unbind(2)  # [B, G, 1, C]
    codes = unpacked(key.codes, rows.shape[-1]).float()
    logits = (rows @ codes.mT) * step + rows.sum(-1, keepdim=True) * low + base
    logits = logits if added is None else logits + added
    low, step = value.ranges.float().split(1, -1)
    return _sums(logits, unpacked(value.codes, value.centre.shape[-1]) * step + low)


def _sums(logits: Tensor, values: Tensor) -> Sums:
    top = logits.amax(-1, keepdim=True).clamp(min=LEAST)
    factors = (logits - top).exp()
    return Sums(factors @ values, factors.sum(-1, keepdim=True), top)


def added_by(mask: Tensor, groups: int, heads: int, queries: int) -> Tensor:
    """What a mask adds to the logits: [B|1, G|1, R|1, L] float32, a group's heads as rows."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    if mask.shape[1] == mask.shape[2] == 1:
        return mask.float()
    mask = mask.float().expand(-1, heads, queries, -1)
    return mask.reshape(mask.shape[0], groups, heads // groups * queries, -1)
