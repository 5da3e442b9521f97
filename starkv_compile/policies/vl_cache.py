"""VL-Cache: it keeps what the text after the last image attends to."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..kernels.ops import STARKV, op
from ..kernels.reference.attention import BOUNDS, pool
from ..kernels.reference.capacity import clip_window
from .base import PooledPolicy
from .inputs import Scored, ScoreInputs

Tensor = torch.Tensor
OBSERVERS = 64
"""Reads at most this many of the last queries, because their attention to all tokens is in memory
at once."""
KEPT = 2.0**20
"""More than attention adds up to. Up to 2^23, float32 keeps its sums with places distinct."""


@op
def post_vision_scores(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    real: Tensor | None,
    frame: Tensor,
    scale: float,
    window: int,
    capacity: int,
    width: int,
) -> Tensor:
    """Pooled attention of the queries after the last visual token. Their own tokens score highest.

    query [B, H, S, D], key [B, G, L, D]; mask, real, window and capacity as in `ScoreInputs`;
    frame [B, G', L], by stored head; width: of the pool. The window's queries count even if they
    are visual. Without a frame, only they count. Returns [B, G', L] float32.
    """
    batch, _, _, dim = query.shape
    groups, length = key.shape[1], key.shape[2]
    window = clip_window(window, capacity, length)
    rows = query[:, :, -OBSERVERS:].float() * scale
    heads, count = rows.shape[1], rows.shape[2]
    packed = rows.reshape(batch, groups, -1, dim)
    logits = torch.matmul(packed, key.float().transpose(2, 3)).view(batch, heads, count, length)
    place = torch.arange(length, device=key.device)
    asking = place[length - count :]
    if mask is None:
        logits = logits.masked_fill(place > asking[:, None], -torch.inf)
    elif mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask[:, :, -count:], -torch.inf)
    else:
        logits = logits + mask[:, :, -count:].float()
    logits = torch.nan_to_num(logits, nan=BOUNDS.min, posinf=BOUNDS.max, neginf=BOUNDS.min)
    last = torch.where(frame >= 0, place, -1).amax(-1, keepdim=True)  # [B, G', 1]
    tail = length - window
    first = torch.where(last < 0, tail, (last + 1).clamp(max=tail))
    observes = asking >= first  # [B, G', rows]
    if real is not None:
        observes = observes & real[:, None, length - count :]
    weights = torch.softmax(logits, dim=-1).view(batch, frame.shape[1], -1, count, length)
    scores = (weights.mean(2) * observes[..., None]).sum(2)
    return torch.where(place >= first, KEPT + place, pool(scores, width))


class VLCache(PooledPolicy):
    """VL-Cache (Tu et al., arXiv 2410.23317), with a set for each KV head.

    score_gt = pool(attention to token t, summed over the queries after the last visual token and
    averaged over the query heads of KV head g). At most 64 of these queries are read. Their own
    tokens stay, the newest first.

    The paper gives each layer a budget in proportion to the density of its attention, measured on
    the same prompt. Then no layer could be compacted before the last one is computed, and lengths
    would depend on data; a compiled graph does not allow that. `measure_layer_budgets` measures
    such budgets beforehand, for the option `layer_budgets`.
    """

    name: ClassVar[str] = "vl_cache"
    per_head: ClassVar[bool] = True
    observers: ClassVar[int] = OBSERVERS

    def score(self, inputs: ScoreInputs) -> Scored:
        scores = STARKV.post_vision_scores(
            inputs.query,
            inputs.key,
            inputs.mask,
            inputs.real,
            inputs.layout[0],
            inputs.scale,
            inputs.window,
            inputs.capacity,
            self.pool,
        )
        return Scored(scores, inputs.state)
