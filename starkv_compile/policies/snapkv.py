"""SnapKV, a set for each KV head."""

from __future__ import annotations

from typing import ClassVar

from .base import PooledPolicy
from .inputs import Scored, ScoreInputs


class SnapKV(PooledPolicy):
    """SnapKV (Li et al., arXiv 2404.14469) on grouped heads, as kvpress (NVIDIA) has it.

    score_gt = pool(mean over the query heads of KV head g of a_t), a_t: attention that the last W
    queries pay to token t. As published every query head keeps a set: see docs/guides/policies.md.
    """

    name: ClassVar[str] = "snapkv"
    per_head: ClassVar[bool] = True

    def score(self, inputs: ScoreInputs) -> Scored:
        return Scored(inputs.pooled_attention(self.pool), inputs.state)
