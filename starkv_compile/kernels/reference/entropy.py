"""The entropy axis: a temperature from how spread a distribution of scores is."""

from __future__ import annotations

import torch


def temperature(
    scores: torch.Tensor, tokens: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """low + (high - low) * entropy of scores [B, ..., P] over its maximum -> [B, ..., 1].

    tokens: [B], how many of the P are real. A tensor, since the logarithm of a symbolic length
    would tie the compiled graph to that length.
    """
    share = scores / scores.sum(-1, keepdim=True).clamp(min=1e-8)
    entropy = -(share * (share + 1e-8).log()).sum(-1, keepdim=True)
    most = tokens.float().log().view(-1, *[1] * (scores.dim() - 1))
    return low + (high - low) * entropy / (most + 1e-8)


def reshape_global(scores: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """max(scores, 0) ** (1 / T), the paper's form: monotone, so no selection can change."""
    return scores.clamp(min=0).pow(1.0 / temperatures)


def reshape_subspaces(
    scores: torch.Tensor, tokens: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """Each group's distribution sharpened or flattened by its own entropy, mass unchanged.

    scores [B, G, P], not negative; tokens [B] as in `temperature`. Acts before groups are fused,
    where it changes what is kept.
    """
    mass = scores.sum(-1, keepdim=True)
    shaped = (scores / mass.clamp(min=1e-30)).pow(1.0 / temperature(scores, tokens, low, high))
    return mass * shaped / shaped.sum(-1, keepdim=True).clamp(min=1e-30)
