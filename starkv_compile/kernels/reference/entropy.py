"""The entropy axis: a temperature from how spread a distribution of scores is."""

from __future__ import annotations

import math

import torch


def temperature(scores: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """low + (high - low) * normalised entropy of scores [..., P] -> [..., 1]."""
    share = scores / scores.sum(-1, keepdim=True).clamp(min=1e-8)
    entropy = -(share * (share + 1e-8).log()).sum(-1, keepdim=True)
    return low + (high - low) * entropy / (math.log(scores.shape[-1]) + 1e-8)


def reshape_global(scores: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """max(scores, 0) ** (1 / T), the paper's form: monotone, so no selection can change."""
    return scores.clamp(min=0).pow(1.0 / temperatures)


def reshape_subspaces(scores: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Each group's distribution sharpened or flattened by its own entropy, mass unchanged.

    scores [B, G, P], not negative. Acts before groups are fused, where it changes what is kept.
    """
    mass = scores.sum(-1, keepdim=True)
    shaped = (scores / mass.clamp(min=1e-30)).pow(1.0 / temperature(scores, low, high))
    return mass * shaped / shaped.sum(-1, keepdim=True).clamp(min=1e-30)
