"""MixKV: it mixes importance with key diversity, head by head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..kernels.ops import STARKV, op
from .base import PooledPolicy
from .inputs import Scored, ScoreInputs

Tensor = torch.Tensor
LEAST = 1e-30


@op
def mixed_scores(
    attention: Tensor, key: Tensor, value: Tensor, real: Tensor | None, sharing: int
) -> Tensor:
    """See `MixKV`.

    attention [B, G / sharing, P], pooled; key, value [B, G, L, D]; real [B, L] bool or None;
    sharing: how many of the key's heads are stored as one. Returns [B, G / sharing, P] float32.
    """
    past = attention.shape[-1]
    keys, values = key[:, :, :past].float(), value[:, :, :past].float()
    good = keys.isfinite().all(-1) & values.isfinite().all(-1)
    if real is not None:
        good = good & real[:, None, :past]
    keys = F.normalize(keys.masked_fill(~good[..., None], 0.0), dim=-1)
    count = good.sum(-1, keepdim=True).float()
    mean = keys.sum(2, keepdim=True) / count.clamp(min=1)[..., None]
    diversity = -(keys * mean).sum(-1)
    pairs = (count * (count - 1)).clamp(min=1)
    redundancy = (((count * mean[:, :, 0]).square().sum(-1, keepdim=True)) - count) / pairs
    norms = values.masked_fill(~good[..., None], 0.0).norm(dim=-1)

    def of_stored_heads(scores: Tensor) -> Tensor:
        return scores.unflatten(1, (-1, sharing)).mean(2)

    norms, diversity = of_stored_heads(norms), of_stored_heads(diversity)
    redundancy = of_stored_heads(redundancy.clamp(0.0, 1.0))
    counts = good.unflatten(1, (-1, sharing)).all(2)
    importance = attention.float() + _on_the_scale_of(attention.float(), norms, counts)
    mixed = (1 - redundancy) * importance + redundancy * _on_the_scale_of(
        importance, diversity, counts
    )
    return mixed.masked_fill(~counts, -1.0)  # below every other score: dropped first


def _on_the_scale_of(wanted: Tensor, scores: Tensor, counts: Tensor) -> Tensor:
    """Stretches `scores` [B, G, P] to [0, 1], then to the mean of `wanted`, where `counts`."""
    low = scores.masked_fill(~counts, torch.inf).amin(-1, keepdim=True)
    high = scores.masked_fill(~counts, -torch.inf).amax(-1, keepdim=True)
    unit = ((scores - low) / (high - low).clamp(min=LEAST)).masked_fill(~counts, 0.0)
    total = wanted.masked_fill(~counts, 0.0).sum(-1, keepdim=True)
    return unit * total / unit.sum(-1, keepdim=True).clamp(min=LEAST)


@dataclass(frozen=True, kw_only=True)
class MixKV(PooledPolicy):
    """MixKV (Liu et al., arXiv 2510.20707) on SnapKV, with a set for each KV head.

    score_gt = (1 - r_g) I_gt + r_g D_gt:

    * I is importance: SnapKV's pooled attention + ||v_t||.
    * D is diversity: -cosine of the key of token t with the mean of all keys of the head, each
      scaled to length 1.
    * r_g is redundancy: the mean cosine of two different keys of head g.

    Means are over the tokens that are scored: before the window, no padding, finite. r_g is cut off
    to [0, 1]. Norms and diversity are stretched to [0, 1], then scaled to the mean of what they are
    added to. The paper's description asks for a common scale and leaves the factor open.
    """

    name: ClassVar[str] = "mixkv"
    per_head: ClassVar[bool] = True

    def score(self, inputs: ScoreInputs) -> Scored:
        scores = STARKV.mixed_scores(
            inputs.pooled_attention(self.pool),
            inputs.key,
            inputs.value,
            inputs.real,
            inputs.sharing,
        )
        return Scored(scores, inputs.state)
