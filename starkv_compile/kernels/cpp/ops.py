"""The C++ functions as ops that compilers do not look into."""

from __future__ import annotations

import torch

from .. import shapes
from ..reference.spatial import GRID_BINS, VALUE_BINS
from . import attention, ranks, selection

Tensor = torch.Tensor


@torch.library.custom_op("starkv::window_attention_cpu", mutates_args=())
def window_attention(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    window: int,
    capacity: int,
    per_head: bool = False,
    log_sum_exp: Tensor | None = None,
) -> Tensor:
    """See `reference.attention.window_attention`."""
    return attention.window_attention(
        query, key, mask, scale, window, capacity, per_head, log_sum_exp
    )


window_attention.register_fake(shapes.window_attention)


@torch.library.custom_op("starkv::rank_histogram_cpu", mutates_args=())
def rank_histogram(scores: Tensor, place: Tensor, valid: Tensor) -> Tensor:
    """See `reference.spatial.rank_histogram`."""
    return ranks.rank_histogram(scores, place, valid)


@rank_histogram.register_fake
def _(scores: Tensor, place: Tensor, valid: Tensor) -> Tensor:
    shape = (*scores.shape[:2], VALUE_BINS, GRID_BINS * GRID_BINS)
    return scores.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("starkv::select_tokens_cpu", mutates_args=())
def select_tokens(
    scores: Tensor, real: Tensor | None, length: int, window: int, capacity: int
) -> Tensor:
    """See `reference.selection.select_tokens`."""
    return selection.select_tokens(scores, real, length, window, capacity)


select_tokens.register_fake(shapes.select_tokens)
