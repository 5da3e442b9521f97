"""Head-mean SnapKV, older frames counting less."""

from __future__ import annotations

from typing import ClassVar

from ..kernels.reference.temporal import age, discount
from .base import Policy
from .inputs import Scored, ScoreInputs


class AgeDecay(Policy):
    """Plain decay by frame age, which is what STaR-KV's temporal axis is at full stability.

    score_t = pool(mean over heads of a_t) * (D_min + (1 - D_min) exp(-delta age_t)), delta:
    `frame_decay`, D_min: `frame_floor`; text and the current frame have age 0.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"pool", "frame_decay", "frame_floor"})

    def score(self, inputs: ScoreInputs) -> Scored:
        scores = inputs.pooled_attention(self.config.pool).mean(1)
        ages = age(inputs.layout[0])[:, : scores.shape[-1]]
        factor = discount(ages, 1.0, self.config.frame_decay, self.config.frame_floor)
        return Scored(scores * factor, inputs.state)
