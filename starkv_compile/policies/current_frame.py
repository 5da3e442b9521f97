"""Text and the current frame first, older frames last."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..kernels.reference.temporal import age
from .base import PooledPolicy
from .inputs import Scored, ScoreInputs

LEAST = 1e-30


class CurrentFrame(PooledPolicy):
    """Keeps text and the newest frame, as an agent without history would. A baseline.

    Older frames fill what room is left. Within both groups, `snapkv_mean` gives the order.
    """

    name: ClassVar[str] = "current_frame"

    def score(self, inputs: ScoreInputs) -> Scored:
        scores = inputs.pooled_attention(self.pool).mean(1)
        older = age(inputs.layout[0])[:, : scores.shape[-1]] > 0
        # Below zero, in the same order, and no digit lost as by subtracting a constant.
        return Scored(torch.where(older, -1.0 / (scores + LEAST), scores), inputs.state)
