"""Computes window attention in float64 step by step, to check the kernels."""

from __future__ import annotations

import torch


def window_attention(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float, window: int
) -> torch.Tensor:
    """Returns [B, H, P] from the softmax over the whole row.

    The arguments are those of `reference.window_attention`.
    """
    query, key = query.double(), key.double()
    length, repeats = key.shape[2], query.shape[1] // key.shape[1]
    logits = query[:, :, -window:] @ key.repeat_interleave(repeats, 1).mT * scale
    if mask is None:
        place = torch.arange(length, device=key.device)
        logits = logits.masked_fill(place > place[-window:, None], -torch.inf)
    elif mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask[:, :, -window:], -torch.inf)
    else:
        logits = logits + mask[:, :, -window:].double()
    return logits.softmax(-1)[..., : length - window].sum(2)


def by_group(scores: torch.Tensor, groups: int) -> torch.Tensor:
    """Returns the mean over the query heads of each KV head: [B, H, P] -> [B, G, P]."""
    batch, heads, past = scores.shape
    return scores.view(batch, groups, heads // groups, past).mean(2)
