"""The entropy axis: a temperature that follows the entropy of the scores."""

from __future__ import annotations

import torch


def temperature(
    scores: torch.Tensor, tokens: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """low + (high - low) * entropy of scores [B, ..., P] over its maximum -> [B, ..., 1].

    tokens: [B], how many of the P are real. It is a tensor, because the logarithm of a symbolic
    length would fix the compiled graph to that length.
    """
    share = scores / scores.sum(-1, keepdim=True).clamp(min=1e-8)
    entropy = -(share * (share + 1e-8).log()).sum(-1, keepdim=True)
    most = tokens.float().log().view(-1, *[1] * (scores.dim() - 1))
    return low + (high - low) * entropy / (most + 1e-8)


def reshape_global(scores: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """max(scores, 0) ** (1 / T), the paper's form. It is monotone, so no selection can change."""
    return scores.clamp(min=0).pow(1.0 / temperatures)


def reshape_subspaces(
    scores: torch.Tensor, tokens: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """Sharpens or flattens each group's distribution by its own entropy. Its mass stays.

    scores [B, G, P], not negative; tokens [B] as in `temperature`. It acts before groups are fused,
    so it changes which tokens stay.
    """
    mass = scores.sum(-1, keepdim=True)
    shaped = (scores / mass.clamp(min=1e-30)).pow(1.0 / temperature(scores, tokens, low, high))
    return mass * shaped / shaped.sum(-1, keepdim=True).clamp(min=1e-30)
