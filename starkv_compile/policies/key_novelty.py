"""Attention, plus how much a token's keys differ from all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..validation import number
from .base import PooledPolicy
from .inputs import Scored, ScoreInputs


@dataclass(frozen=True, kw_only=True)
class KeyNovelty(PooledPolicy):
    """Attention plus key novelty: a token whose keys resemble all others carries little.

    score_t = A_t + nu N_t, each scaled to sum 1. A is the score of `snapkv_mean`. N_t is 1 - mean
    of cos(k_t, k_s) over the stored tokens s. k_t is the keys of all KV heads, concatenated. nu is
    `novelty_weight`.

    Source: this project. KeyDiff (Park et al., arXiv 2504.15364) uses key diversity as a sign of
    importance.
    """

    name: ClassVar[str] = "key_novelty"

    novelty_weight: float = number(1.0, least=0)
    """Weight of key novelty relative to attention [nu]. 0: no novelty."""

    def score(self, inputs: ScoreInputs) -> Scored:
        attention = inputs.pooled_attention(self.pool).mean(1)
        novelty = inputs.key_novelty()[:, : attention.shape[-1]]
        return Scored(share(attention) + self.novelty_weight * share(novelty), inputs.state)


def share(scores: Any) -> Any:
    """Scores [B, P] scaled to sum 1."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-30)
