"""The scores of `snapkv_mean`, with a boost of the current frame by hidden norm."""

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
    """The score of `snapkv_mean`, with a boost of the current frame.

    The STaR-KV release computes this for a single screenshot, where its other axes do nothing. The
    boost is that of GUI-KV (Huang et al., arXiv 2510.00536).

    score_t = pool(mean of a_t over all heads) + alpha u_t. u is a softmax over the current frame:
    of the standardised norms of the key projection's inputs, divided by a temperature. alpha is
    `boost`. If the pass finds no key projection, there is no boost, and the report has a note.
    """

    name: ClassVar[str] = "snapkv_boost"

    boost: float = number(2.0, least=0)
    """Adds this much score to the current frame [alpha]. Each token's part follows the norm of its
    hidden state. 0: no boost."""

    boost_temperature: float = number(3.5, above=0)
    """Temperature of the softmax that divides the boost among the tokens."""

    def score(self, inputs: ScoreInputs) -> Scored:
        scores = inputs.pooled_attention(self.pool)
        return Scored((scores + self.added_boost(inputs, scores.shape[-1])).mean(1), inputs.state)

    def added_boost(self, inputs: ScoreInputs, past: Any) -> Any:
        """Returns [B, 1, P], or 0 without a boost or without hidden states."""
        if inputs.hidden is None or self.boost == 0:
            return 0.0
        frame, _, _, current = inputs.layout
        added = STARKV.current_frame_boost(
            inputs.hidden, frame, current, past, self.boost_temperature
        )
        return self.boost * added[:, None]
