"""Attention, and how unlike the others a token's keys are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..validation import number
from .base import PooledPolicy
from .inputs import Scored, ScoreInputs


@dataclass(frozen=True, kw_only=True)
class KeyNovelty(PooledPolicy):
    """Screens repeat themselves: a token whose keys resemble all others' carries little.

    score_t = A_t + nu N_t, both scaled to sum 1. A: head-mean SnapKV; N_t = 1 - mean over stored
    tokens s of cos(k_t, k_s), k: the keys of all KV heads side by side; nu: `novelty_weight`. Ours;
    key diversity as a sign of importance is KeyDiff's (Park et al., arXiv 2504.15364).
    """

    name: ClassVar[str] = "key_novelty"

    novelty_weight: float = number(1.0, least=0)
    """Weight of key novelty next to attention [nu]. 0 = none."""

    def score(self, inputs: ScoreInputs) -> Scored:
        attention = inputs.pooled_attention(self.pool).mean(1)
        novelty = inputs.key_novelty()[:, : attention.shape[-1]]
        return Scored(share(attention) + self.novelty_weight * share(novelty), inputs.state)


def share(scores: Any) -> Any:
    """Scores [B, P] scaled to sum 1."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-30)
