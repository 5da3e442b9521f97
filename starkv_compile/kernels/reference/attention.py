"""Attention that the last W queries pay to every earlier key."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .capacity import clip_window

BOUNDS = torch.finfo(torch.float32)


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    window: int,
    capacity: int,
    per_head: bool = False,
    log_sum_exp: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of the window's queries, summed over the window, by KV head.

    Args:
        query: [B, H, S, D], positions already encoded.
        key: [B, G, L, D], one per KV head, positions already encoded.
        mask: None for causal attention; or [B|1, 1|H, S, L], bool (True = visible) or additive.
        scale: what the model multiplies QK^T by.
        window: W before clipping to the capacity.
        capacity: C.
        per_head: one row a query head, instead of the mean over the heads of each KV head.
        log_sum_exp: [B, H, S] of all visible logits, natural logarithm, where this very
            attention has computed it. Spares a pass over the keys.

    Returns:
        [B, G, P] float32, or [B, H, P] per head; P = L - W.

    A logit that is not a number counts as invisible and an infinite one as the largest finite
    number: one bad key loses its own place and disturbs no other. A query that sees nothing, or
    whose given log_sum_exp is not finite, does not vote.
    """
    batch, heads, queries, dim = query.shape
    groups, length = key.shape[1], key.shape[2]
    window = clip_window(window, capacity, length)
    if queries < window:
        raise ValueError(f"window of {window} tokens, but only {queries} queries")
    past, rows = length - window, heads // groups * window
    # Keys on the left, and the query heads of a KV head as columns of one product: K is read
    # once and never repeated.
    packed = query[:, :, -window:].float().reshape(batch, groups, rows, dim).transpose(2, 3)
    logits = torch.matmul(key[:, :, :past].float(), packed * scale)  # [B, G, P, rows]
    if mask is not None:
        shown = mask[:, :, -window:].expand(batch, heads, window, length)
        shown = shown.reshape(batch, groups, rows, length).transpose(2, 3)
        logits = _masked(logits, shown[:, :, :past])
    logits = _finite(logits)
    if log_sum_exp is None:
        inside = torch.matmul(key[:, :, past:].float(), packed * scale)
        if mask is None:
            seen = torch.ones(window, window, dtype=torch.bool, device=key.device).triu()
            inside = _masked(inside, seen.repeat(1, heads // groups))
        else:
            inside = _masked(inside, shown[:, :, past:])
        inside = _finite(inside)
        largest = torch.maximum(logits.amax(2, keepdim=True), inside.amax(2, keepdim=True))
        weights = (logits - largest).exp()
        total = weights.sum(2, keepdim=True) + (inside - largest).exp().sum(2, keepdim=True)
        vote = (1.0 / total).where(largest > BOUNDS.min, 0.0)
    else:
        total = log_sum_exp[:, :, -window:].float().reshape(batch, groups, 1, rows)
        weights = (logits - total.where(total.isfinite(), BOUNDS.max)).exp()
        vote = total.isfinite().float()
    # Normalised and summed over the window in one product: a sum over so short a last dimension
    # would take longer.
    vote = vote.transpose(2, 3)  # [B, G, rows, 1]
    if not per_head:
        return torch.matmul(weights, vote / (heads // groups)).squeeze(-1)
    own = torch.eye(heads // groups, device=key.device).repeat_interleave(window, 0)
    by_head = torch.matmul(weights, vote * own)  # [B, G, P, H / G]
    return by_head.transpose(2, 3).reshape(batch, heads, past)


def _masked(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, float("-inf"))
    return logits + mask.float()


def _finite(logits: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(logits, nan=BOUNDS.min, posinf=BOUNDS.max, neginf=BOUNDS.min)


def pool(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Moving average along the tokens, zeros beyond the ends counted. scores [B, G, P]."""
    if width == 1:
        return scores
    return F.avg_pool1d(scores, width, stride=1, padding=width // 2)
