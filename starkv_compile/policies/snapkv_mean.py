"""SnapKV's scores, averaged over all heads, with one set for each layer."""

from __future__ import annotations

from typing import ClassVar

from .base import PooledPolicy
from .inputs import Scored, ScoreInputs


class SnapKVMean(PooledPolicy):
    """The base of STaR-KV (arXiv 2606.01790), without its three axes.

    score_t = pool(mean of a_t over all heads). a_t is the attention that the last W queries pay to
    token t, as in SnapKV (Li et al., arXiv 2404.14469).
    """

    name: ClassVar[str] = "snapkv_mean"

    def score(self, inputs: ScoreInputs) -> Scored:
        return Scored(inputs.pooled_attention(self.pool).mean(1), inputs.state)
