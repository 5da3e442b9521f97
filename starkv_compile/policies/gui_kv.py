"""GUI-KV: SnapKV with a boost of the current frame, and without what older frames repeat of it."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..kernels.ops import STARKV, op
from .inputs import Scored, ScoreInputs
from .snapkv_boost import SnapKVBoost

RANK = 32
"""Of the subspace; of head dims below 128 a quarter, as 32 is of 128: more would be nearly all."""


@op
def repeated_tokens(
    key: torch.Tensor, frame: torch.Tensor, current: torch.Tensor, capacity: int
) -> torch.Tensor:
    """Tokens of older frames whose keys the current frame's span best.

    Args:
        key: [B, G, L, D].
        frame: [B, G', L], by stored head; G / G' heads are stored as one, which is judged by
            their mean residual.
        current: [B, N], as in `reference.star.Layout`.
        capacity: C; a share of 1 - C / L of the older frames' tokens is named, rounded down.

    Returns:
        [B, G', L] bool. False for a row without a current frame.
    """
    dim, length = key.shape[3], key.shape[2]
    keys = key.float()
    keys = keys.where(keys.isfinite(), 0.0)
    first = current[:, : min(RANK, dim // 4)]
    place = first.clamp(min=0)[:, None, :, None].expand(-1, key.shape[1], -1, dim)
    spanning = keys.gather(2, place) * (first >= 0)[:, None, :, None]
    basis, triangle = torch.linalg.qr(spanning.transpose(2, 3))
    # A column that adds nothing to those before it has a direction of no meaning.
    size = triangle.diagonal(dim1=2, dim2=3).abs()
    basis = basis * (size > 1e-6 * size.amax(-1, keepdim=True))[:, :, None]
    inside = torch.matmul(torch.matmul(keys, basis), basis.transpose(2, 3))
    residual = (keys - inside).norm(dim=-1).unflatten(1, (frame.shape[1], -1)).mean(2)
    older = (frame >= 0) & (frame < frame.amax(-1, keepdim=True))
    older = older & (current >= 0).any(-1)[:, None, None]
    order = residual.masked_fill(~older, torch.inf).sort(dim=-1, stable=True).indices
    rank = order.argsort(dim=-1)
    count = older.sum(-1, keepdim=True) * (length - capacity) // length
    return older & (rank < count)


class GuiKV(SnapKVBoost):
    """GUI-KV (Huang et al., arXiv 2510.00536), a set for each KV head.

    score_gt = pool(a_gt) + alpha u_t, u as in `snapkv_boost`; 0 for the floor((1 - b) n) of the n
    tokens of older frames with the smallest ||k_t - Q Q^T k_t||, b = C / L the budget. Q: the first
    32 columns of the QR decomposition of the current frame's keys, which span the keys of its
    first 32 tokens. a: mean over the query heads of a KV head; as published every query head
    keeps a set, and frames are judged by each.
    """

    name: ClassVar[str] = "gui_kv"
    per_head: ClassVar[bool] = True

    def score(self, inputs: ScoreInputs) -> Scored:
        scores = inputs.pooled_attention(self.pool)
        past = scores.shape[-1]
        scores = scores + self.added_boost(inputs, past)
        frame, _, _, current = inputs.layout
        repeated = STARKV.repeated_tokens(inputs.key, frame, current, inputs.capacity)
        return Scored(scores.masked_fill(repeated[..., :past], 0.0), inputs.state)
