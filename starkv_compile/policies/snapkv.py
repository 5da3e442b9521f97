"""SnapKV, with a set for each KV head."""

from __future__ import annotations

from typing import ClassVar

from .base import PooledPolicy
from .inputs import Scored, ScoreInputs


class SnapKV(PooledPolicy):
    """SnapKV (Li et al., arXiv 2404.14469) on grouped heads, as in kvpress (NVIDIA).

    score_gt = pool(mean of a_t over the query heads of KV head g). a_t is the attention that the
    last W queries pay to token t. Each KV head keeps a set. In the paper, each query head keeps
    one.
    """

    name: ClassVar[str] = "snapkv"
    per_head: ClassVar[bool] = True

    def score(self, inputs: ScoreInputs) -> Scored:
        return Scored(inputs.pooled_attention(self.pool), inputs.state)
