"""The scores of `snapkv_mean`; older frames count less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..kernels.reference.temporal import age, discount
from ..validation import number
from .base import PooledPolicy
from .inputs import Scored, ScoreInputs


@dataclass(frozen=True, kw_only=True)
class AgeDecay(PooledPolicy):
    """Decay by the age of frames. STaR-KV's time axis does the same at full stability.

    score_t = pool(mean of a_t over all heads) * (D_min + (1 - D_min) exp(-delta age_t)). a_t is the
    attention that the last W queries pay to token t. delta is `frame_decay`, D_min is
    `frame_floor`. Text and the current frame have age 0.
    """

    name: ClassVar[str] = "age_decay"

    frame_decay: float = number(0.1, least=0)
    """Discount rate per frame of age [delta]. 0: no discount."""

    frame_floor: float = number(0.0, least=0, most=1)
    """Smallest factor that the discount can reach [D_min]."""

    def score(self, inputs: ScoreInputs) -> Scored:
        scores = inputs.pooled_attention(self.pool).mean(1)
        ages = age(inputs.layout[0])[:, : scores.shape[-1]]
        factor = discount(ages, 1.0, self.frame_decay, self.frame_floor)
        return Scored(scores * factor, inputs.state)
