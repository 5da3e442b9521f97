"""ST-Lite: it keeps tokens unlike their neighbours on the screen and unlike the newest screen."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..kernels.ops import STARKV, op
from .base import PooledPolicy
from .inputs import Scored, ScoreInputs

Tensor = torch.Tensor


@op
def repeats_current(units: Tensor, frame: Tensor, current: Tensor, capacity: int) -> Tensor:
    """Marks the tokens of older frames, except for the C that are least like the current frame.

    units [B, L, G * D] as in `ScoreInputs.unit_keys`; frame [B, L] and current [B, N] as in
    `reference.star.Layout`. Returns [B, L] bool.
    """
    valid = current >= 0
    place = current.where(valid, 0)[..., None].expand(-1, -1, units.shape[-1])
    alike = torch.matmul(units, units.gather(1, place).transpose(1, 2))  # [B, L, N]
    nearest = alike.masked_fill(~valid[:, None], -torch.inf).amax(-1)
    older = (frame >= 0) & (frame < frame.amax(-1, keepdim=True)) & valid.any(-1, keepdim=True)
    order = nearest.masked_fill(~older, torch.inf).sort(dim=-1, stable=True).indices
    return older & (order.argsort(dim=-1) >= capacity)


class STLite(PooledPolicy):
    """ST-Lite (arXiv 2603.00188), from its published description.

    A visual token scores 1 - mean cosine of its key with those of its 8 neighbours on the screen. A
    token's key is here the keys of all KV heads, concatenated. Some tokens of older frames come
    last: those whose largest cosine with a token of the current frame is above the C-th smallest.

    Text scores as in `snapkv_mean`. The description leaves open how text and screens compare. Here
    text counts as its share of the largest attention to text, so that it is between 0 and 1, as
    most scores of screens are.
    """

    name: ClassVar[str] = "st_lite"

    def score(self, inputs: ScoreInputs) -> Scored:
        attention = inputs.pooled_attention(self.pool).mean(1)
        past = attention.shape[-1]
        units = inputs.unit_keys()
        frame, _, _, current = inputs.layout
        novelty = inputs.spatial_novelty()
        screen = novelty[:, :past]
        repeated = STARKV.repeats_current(units, frame, current, inputs.capacity)[:, :past]
        text = attention.masked_fill(frame[:, :past] >= 0, 0.0)
        text = text / text.amax(-1, keepdim=True).clamp(min=1e-30)
        scores = torch.where(frame[:, :past] >= 0, screen, text)
        return Scored(scores.masked_fill(repeated, -1.0), inputs.state, novelty)
