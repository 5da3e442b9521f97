"""SnapKV's scores averaged over all heads, one set a layer."""

from __future__ import annotations

from typing import ClassVar

from .base import PooledPolicy
from .inputs import Scored, ScoreInputs


class SnapKVMean(PooledPolicy):
    """What STaR-KV starts from (arXiv 2606.01790), without its three axes.

    score_t = pool(mean over heads of a_t), a_t: attention that the last W queries pay to token t,
    as in SnapKV (Li et al., arXiv 2404.14469).
    """

    name: ClassVar[str] = "snapkv_mean"

    def score(self, inputs: ScoreInputs) -> Scored:
        return Scored(inputs.pooled_attention(self.pool).mean(1), inputs.state)
