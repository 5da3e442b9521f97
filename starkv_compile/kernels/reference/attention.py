"""Attention that the last W queries pay to every earlier key."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .capacity import checked_window

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
        per_head: one row for each query head, instead of the mean over the heads of each KV head.
        log_sum_exp: [B, H, S] of all visible logits, natural logarithm, if this very attention has
            computed it. It saves a pass over the keys.

    Returns:
        [B, G, P] float32, or [B, H, P] per head; P = L - W.

    A NaN logit counts as invisible, and an infinite one as the largest finite number. So a bad key
    affects its own score only. A query that sees nothing, or whose given log_sum_exp is not finite,
    does not vote.
    """
    batch, heads, queries, dim = query.shape
    groups, length = key.shape[1], key.shape[2]
    window = checked_window(window, capacity, length, queries)
    past, rows = length - window, heads // groups * window
    # The query heads of a KV head are rows of one product: K is read once and never repeated. The
    # tokens are the last dimension, so that everything after the product is vectorised.
    packed = query[:, :, -window:].float().reshape(batch, groups, rows, dim) * scale
    keys = key.float().transpose(2, 3)
    logits = torch.matmul(packed, keys[..., :past])  # [B, G, rows, P]
    if mask is not None:
        shown = mask[:, :, -window:].expand(batch, heads, window, length)
        shown = shown.reshape(batch, groups, rows, length)
        logits = _masked(logits, shown[..., :past])
    logits = _finite(logits)
    if log_sum_exp is None:
        inside = window_logits(packed, key, None if mask is None else shown, window)
        largest = torch.maximum(logits.amax(3, keepdim=True), inside.amax(3, keepdim=True))
        weights = (logits - largest).exp()
        total = weights.sum(3, keepdim=True) + (inside - largest).exp().sum(3, keepdim=True)
        vote = (1.0 / total).where(largest > BOUNDS.min, 0.0)
    else:
        total = log_sum_exp[:, :, -window:].float().reshape(batch, groups, rows, 1)
        weights = (logits - total.where(total.isfinite(), BOUNDS.max)).exp()
        vote = total.isfinite().float()
    voted = weights * vote
    if per_head:
        return voted.reshape(batch, heads, window, past).sum(2)
    return voted.sum(2) / (heads // groups)


def window_logits(
    packed: torch.Tensor, key: torch.Tensor, shown: torch.Tensor | None, window: int
) -> torch.Tensor:
    """Logits of the window's own keys: [B, G, rows, W]. A query sees the keys up to its own.

    packed: [B, G, rows, D], the scaled queries of a KV head's query heads, W of each. shown: a mask
    [B, G, rows, L] that replaces causality.
    """
    logits = torch.matmul(packed, key[:, :, -window:].float().transpose(2, 3))
    if shown is not None:
        return _finite(_masked(logits, shown[..., -window:]))
    seen = torch.ones(window, window, dtype=torch.bool, device=key.device).tril()
    return _finite(_masked(logits, seen.repeat(packed.shape[2] // window, 1)))


def _masked(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, float("-inf"))
    return logits + mask.float()


def _finite(logits: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(logits, nan=BOUNDS.min, posinf=BOUNDS.max, neginf=BOUNDS.min)


def pool(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Moving average along the tokens. Beyond the ends it counts zeros. scores [B, G, P]."""
    if width == 1:
        return scores
    return F.avg_pool1d(scores, width, stride=1, padding=width // 2)
