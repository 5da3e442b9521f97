"""Attention, and how unlike the others a token's keys are."""

from __future__ import annotations

from typing import Any, ClassVar

from .base import Policy
from .inputs import Scored, ScoreInputs


class KeyNovelty(Policy):
    """Screens repeat themselves: a token whose keys resemble all others' carries little.

    score_t = A_t + nu N_t, both scaled to sum 1. A: head-mean SnapKV; N_t = 1 - mean over stored
    tokens s of cos(k_t, k_s), k: the keys of all KV heads side by side; nu: `novelty_weight`.
    Linear in the prompt: the mean of cosines is one with the mean of unit vectors. Ours; key
    diversity as a sign of importance is KeyDiff's (Park et al., arXiv 2504.15364).
    """

    reads: ClassVar[frozenset[str]] = frozenset({"pool", "novelty_weight"})

    def score(self, inputs: ScoreInputs) -> Scored:
        attention = inputs.pooled_attention(self.config.pool).mean(1)
        units = inputs.unit_keys()
        mean = units.sum(1) / inputs.places()[:, -1:]
        novelty = 1.0 - (units * mean[:, None]).sum(-1)
        known = (units != 0).any(-1)
        novelty = novelty.masked_fill(~known, 0.0)[:, : attention.shape[-1]]
        return Scored(
            _share(attention) + self.config.novelty_weight * _share(novelty), inputs.state
        )


def _share(scores: Any) -> Any:
    """Scores [B, P] scaled to sum 1."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-30)
