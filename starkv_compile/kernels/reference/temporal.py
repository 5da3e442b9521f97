"""The temporal axis: older frames count less, and still less in subspaces that stay stable."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def update_pattern(
    scores: torch.Tensor,
    valid: torch.Tensor,
    pattern: torch.Tensor,
    pattern_count: torch.Tensor,
    decay: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moving average of each group's attention over the current frame, and its stability.

    Args:
        scores: [B, G, N] group scores of the current frame's tokens.
        valid: [B, N] bool.
        pattern: [B, G, N], the average so far.
        pattern_count: [B], tokens of the frames it averages; with another count it starts again.
        decay: weight of the past.

    Returns:
        new pattern [B, G, N], new count [B], stability [B, G] in 0..1 (cosine).
        A row without a current frame keeps its pattern and has stability 1.
    """
    count = valid.sum(-1)
    scores = scores.masked_fill(~valid[:, None], 0.0)
    now = scores / scores.sum(-1, keepdim=True).clamp(min=1e-30)
    fresh = (pattern_count != count)[:, None, None]
    blended = torch.where(fresh, now, decay * pattern + (1 - decay) * now)
    stability = F.cosine_similarity(now, blended, dim=-1).clamp(0.0, 1.0)
    shown = count > 0
    return (
        torch.where(shown[:, None, None], blended, pattern),
        torch.where(shown, count, pattern_count),
        torch.where(shown[:, None], stability, 1.0),
    )


def age(frame: torch.Tensor) -> torch.Tensor:
    """Frames after each token's frame; 0 for text and the newest frame. frame [B, L] -> [B, L]."""
    return (frame.amax(-1, keepdim=True) - frame).where(frame >= 0, 0)


def discount(
    age: torch.Tensor, stability: torch.Tensor | float, rate: float, floor: float
) -> torch.Tensor:
    """floor + (1 - floor) exp(-rate * age * stability); 1 where age is 0.

    age [B, P]: frames since the token's frame (0 for text and the current frame).
    stability [B, P]: of the token's winning group, or one for all.
    """
    return floor + (1.0 - floor) * torch.exp(-rate * age * stability)
