"""Expected attention, from the prompt's own queries."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..kernels.ops import STARKV, op
from .base import Policy
from .inputs import Scored, ScoreInputs
from .streaming_llm import SINKS

BOUNDS = torch.finfo(torch.float32)


@op
def attention_expected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, places: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention that normally distributed queries pay to each token, times the norm of its value.

    query [B, H, S, D], key and value [B, G, L, D]; places [B, L] as in `ScoreInputs.places`. The
    first four tokens count neither as queries nor as keys. Returns [B, G, L] float32.
    """
    batch, _, queries, dim = query.shape
    groups = key.shape[1]
    known = (places[:, -queries:] > SINKS)[:, None, :, None]
    query = query.float().masked_fill(~known, 0.0)
    count = known.sum(2, keepdim=True).clamp(min=1)
    mean = query.sum(2, keepdim=True) / count
    spread = (query - mean).masked_fill(~known, 0.0)
    covariance = torch.matmul(spread.transpose(2, 3), spread) / count  # [B, H, D, D]
    # The query heads of a KV head are one dimension: keys are never repeated.
    mean = mean.reshape(batch, groups, -1, dim)
    covariance = covariance.reshape(batch, groups, -1, dim, dim)
    keys = key.float()
    linear = torch.matmul(mean, keys.transpose(2, 3))  # [B, G, H / G, L]
    turned = torch.matmul(keys[:, :, None], covariance)
    squared = (turned * keys[:, :, None]).sum(-1)
    logits = scale * linear + 0.5 * scale * scale * squared
    asked = (places > SINKS)[:, None, None] & logits.isfinite()
    logits = logits.masked_fill(~asked, BOUNDS.min)
    weight = torch.softmax(logits, dim=-1).mean(2)
    return weight * value.float().norm(dim=-1)


class ExpectedAttention(Policy):
    """Expected attention (Devoto et al., arXiv 2510.00636), as far as a graph allows.

    score_t = mean over heads of softmax(K mu / sqrt(d) + K S K^T / 2d)_t ||v_t||. mu and S are mean
    and covariance of the queries. The first 4 tokens stay.

    The paper takes queries before their rotary positions and rotates them to the positions of the
    next 512 tokens. A graph pass sees rotated queries, so the prompt's own positions stand for the
    later ones. A later turn uses the statistics of its own queries.
    """

    name: ClassVar[str] = "expected_attention"

    def score(self, inputs: ScoreInputs) -> Scored:
        places = inputs.places()
        scores = STARKV.attention_expected(
            inputs.query, inputs.key, inputs.value, places, inputs.scale
        )
        return Scored(torch.where(places <= SINKS, BOUNDS.max, scores.mean(1)), inputs.state)
