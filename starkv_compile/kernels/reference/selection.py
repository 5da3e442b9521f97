"""Exact selection and compaction."""

from __future__ import annotations

import torch

from .capacity import split_capacity


def select_tokens(
    scores: torch.Tensor, real: torch.Tensor | None, length: int, window: int, capacity: int
) -> torch.Tensor:
    """Indices of the best-scored tokens and of the whole window, ascending.

    Args:
        scores: [B, P] float32.
        real: [B, L] bool, False at padding, or None if there is none.
        length: L. window: W before clipping. capacity: C.

    Returns:
        [B, C'] int64, C' as in `split_capacity`. Ties go to the lowest index. A score that is
        not finite ranks below every finite one; padding ranks below everything.
    """
    past = scores.shape[-1]
    selected, _ = split_capacity(length, window, capacity)
    order = best_first(scores, real)
    tail = torch.arange(past, length, device=scores.device).expand(scores.shape[0], -1)
    return torch.cat([order[:, :selected].sort(dim=-1).values, tail], dim=-1)


def best_first(scores: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Tokens before the window, in the order of selection. scores [B, P] -> [B, P]."""
    return rank(scores, real).sort(dim=-1, descending=True, stable=True).indices


def rank(scores: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """The sort key: scores [B, P], with those that are not finite last, then padding."""
    ranked = scores.masked_fill(~scores.isfinite(), torch.finfo(scores.dtype).min)
    if real is None:
        return ranked
    return ranked.masked_fill(~real[:, : scores.shape[-1]], float("-inf"))


def gather_kv(
    key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor, real: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept rows of key and value [B, G, L, D], each in new storage. Padding becomes zero.

    kept [B, C] ascending. The results are never views: a slice would keep the full cache alive.
    """
    return _take(key, kept, real), _take(value, kept, real)


def _take(source: torch.Tensor, kept: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    batch, groups, length, dim = source.shape
    # Row index into [B*G*L, D]: `index_select` beats a gather with an expanded index by far.
    offset = torch.arange(batch * groups, device=source.device).view(batch, groups, 1) * length
    rows = (offset + kept[:, None]).reshape(-1)
    flat = source.reshape(-1, dim).index_select(0, rows)
    # Not a view: for a cached tensor with a base, Dynamo would compile a first step apart.
    out = torch.ops.aten._unsafe_view(flat, [batch, groups, kept.shape[1], dim])
    if real is None:
        return out
    return out.masked_fill(~real.gather(1, kept)[:, None, :, None], 0.0)
