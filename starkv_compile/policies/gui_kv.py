"""GUI-KV: SnapKV with a boost of the current frame, and without older tokens that it repeats."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..kernels.ops import STARKV, op
from .inputs import Scored, ScoreInputs
from .snapkv_boost import SnapKVBoost

RANK = 32
"""Rank of the subspace. Head sizes below 128 take a quarter of their size, as 32 is of 128. A
higher rank would span nearly everything."""


@op
def repeated_tokens(
    key: torch.Tensor, frame: torch.Tensor, current: torch.Tensor, capacity: int
) -> torch.Tensor:
    """Marks tokens of older frames whose keys are best spanned by the current frame's keys.

    Args:
        key: [B, G, L, D].
        frame: [B, G', L], by stored head. G / G' heads are stored as one, and their mean residual
            decides.
        current: [B, N], as in `reference.star.Layout`.
        capacity: C. A share of 1 - C / L of the older frames' tokens is marked, rounded down.

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
    # If a column adds nothing to those before it, its direction has no meaning.
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
    """GUI-KV (Huang et al., arXiv 2510.00536), with a set for each KV head.

    score_gt = pool(a_gt) + alpha u_t. a_gt is the attention that the last W queries pay to token t,
    averaged over the query heads of KV head g. u is as in `snapkv_boost`.

    Of the n tokens of older frames, the floor((1 - b) n) with the smallest ||k_t - Q Q^T k_t|| have
    score 0. b = C / L is the budget. Q is the first 32 columns of the QR decomposition of the
    current frame's keys. They span the keys of its first 32 tokens.

    In the paper, each query head keeps a set and compares frames on its own.
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
