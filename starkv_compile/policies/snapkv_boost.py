"""Head-mean SnapKV with a boost of the current frame by hidden norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..kernels.ops import STARKV, op
from ..kernels.reference.star import frame_boost
from ..validation import number
from .base import PooledPolicy
from .inputs import Scored, ScoreInputs


@op
def current_frame_boost(
    hidden: torch.Tensor,
    frame: torch.Tensor,
    current: torch.Tensor,
    past: int,
    temperature: float,
) -> torch.Tensor:
    """See `reference.star.frame_boost`."""
    return frame_boost(hidden, frame, current, past, temperature)


@dataclass(frozen=True, kw_only=True)
class SnapKVBoost(PooledPolicy):
    """What the STaR-KV release computes for a single screenshot, where its other axes are inert.

    score_t = pool(mean over heads of a_t) + alpha u_t; u: softmax over the current frame of the
    standardised norms of what the key projection reads, over a temperature; alpha: `boost`.
    Source: GUI-KV (Huang et al., arXiv 2510.00536), whose boost it is. Where the pass finds no key
    projection there is no boost, which the report notes.
    """

    name: ClassVar[str] = "snapkv_boost"

    boost: float = number(2.0, least=0)
    """Score mass added to the current frame, shared out by hidden norm [alpha]. 0 = none."""

    boost_temperature: float = number(3.5, above=0)
    """Temperature of that sharing out."""

    def score(self, inputs: ScoreInputs) -> Scored:
        scores = inputs.pooled_attention(self.pool)
        return Scored((scores + self.added_boost(inputs, scores.shape[-1])).mean(1), inputs.state)

    def added_boost(self, inputs: ScoreInputs, past: Any) -> Any:
        """[B, 1, P], or 0 where there is nothing to boost by."""
        if inputs.hidden is None or self.boost == 0:
            return 0.0
        frame, _, _, current = inputs.layout
        added = STARKV.current_frame_boost(
            inputs.hidden, frame, current, past, self.boost_temperature
        )
        return self.boost * added[:, None]
