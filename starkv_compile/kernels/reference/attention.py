"""Attention that the last W queries pay to every earlier key."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .capacity import clip_window


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    window: int,
    capacity: int,
) -> torch.Tensor:
    """Softmax attention of the window's queries, summed over the window.

    Args:
        query: [B, H, S, D], positions already encoded.
        key: [B, G, L, D], one per KV head, positions already encoded.
        mask: None for causal attention; or [B|1, 1|H, S, L], bool (True = visible) or additive.
        scale: what the model multiplies QK^T by.
        window: W before clipping to the capacity.
        capacity: C.

    Returns:
        [B, H, P] float32, P = L - W.

    A logit that is not a number counts as invisible and an infinite one as the largest finite
    number: one bad key loses its own place and disturbs no other.
    """
    batch, heads, _, dim = query.shape
    groups, length = key.shape[1], key.shape[2]
    window = clip_window(window, capacity, length)
    if query.shape[2] < window:
        raise ValueError(f"window of {window} tokens, but only {query.shape[2]} queries")
    rows = query[:, :, -window:].float()
    # GQA packed: the r query heads of a KV head are rows of one product, K is never repeated.
    packed = rows.reshape(batch, groups, heads // groups * window, dim)
    logits = torch.matmul(packed, key.float().transpose(-1, -2)) * scale
    logits = logits.view(batch, heads, window, length)
    if mask is None:
        visible = torch.ones(window, window, dtype=torch.bool, device=key.device).tril()
        corner = logits[..., length - window :].masked_fill(~visible, float("-inf"))
        logits = torch.cat([logits[..., : length - window], corner], dim=-1)
    elif mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask[:, :, -window:], float("-inf"))
    else:
        logits = logits + mask[:, :, -window:].float()
    bounds = torch.finfo(torch.float32)
    logits = torch.nan_to_num(logits, nan=bounds.min, posinf=bounds.max, neginf=bounds.min)
    return F.softmax(logits, dim=-1)[..., : length - window].sum(dim=2)


def pool(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Moving average along the tokens, zeros beyond the ends counted. scores [B, H, P]."""
    if width == 1:
        return scores
    return F.avg_pool1d(scores, width, stride=1, padding=width // 2)
