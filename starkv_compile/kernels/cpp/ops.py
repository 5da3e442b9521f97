"""The C++ functions as ops that compilers do not look into."""

from __future__ import annotations

import torch

from .. import shapes
from ..reference.quantization import Quantized
from ..reference.quantized_attention import Sums
from ..reference.spatial import GRID_BINS, VALUE_BINS
from . import attention, novelty, quantization, quantized_attention, ranks, selection

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


@torch.library.custom_op("starkv::spatial_novelty_cpu", mutates_args=())
def spatial_novelty(
    key: Tensor, frame: Tensor, row: Tensor, column: Tensor, earlier: Tensor
) -> Tensor:
    """See `reference.novelty.spatial_novelty`."""
    return novelty.spatial_novelty(key, frame, row, column, earlier)


spatial_novelty.register_fake(shapes.novelty)


@torch.library.custom_op("starkv::temporal_novelty_cpu", mutates_args=())
def temporal_novelty(
    key: Tensor, frame: Tensor, row: Tensor, column: Tensor, current: Tensor, stored: int
) -> Tensor:
    """See `reference.novelty.temporal_novelty`."""
    return novelty.temporal_novelty(key, frame, row, column, current, stored)


temporal_novelty.register_fake(shapes.novelty)


@torch.library.custom_op("starkv::key_novelty_cpu", mutates_args=())
def key_novelty(key: Tensor, among: Tensor) -> Tensor:
    """See `reference.novelty.key_novelty`."""
    return novelty.key_novelty(key, among)


key_novelty.register_fake(shapes.novelty)


@torch.library.custom_op("starkv::centre_cpu", mutates_args=())
def centre_of(rows: Tensor) -> Tensor:
    """See `reference.quantization.centre_of`."""
    return quantization.centre_of(rows)


centre_of.register_fake(shapes.centre)


@torch.library.custom_op("starkv::quantize_cpu", mutates_args=())
def codes_and_ranges(rows: Tensor, centre: Tensor, nbits: int) -> tuple[Tensor, Tensor]:
    """See `reference.quantization.codes_and_ranges`."""
    return quantization.codes_and_ranges(rows, centre, nbits)


codes_and_ranges.register_fake(shapes.quantize)


@torch.library.custom_op("starkv::attend_codes_cpu", mutates_args=())
def _attend_codes(
    rows: Tensor,
    base: Tensor,
    key_codes: Tensor,
    key_ranges: Tensor,
    value_codes: Tensor,
    value_ranges: Tensor,
    width: int,
    added: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `cpp.quantized_attention.attend_codes`."""
    return quantized_attention.attend_codes(
        rows, base, key_codes, key_ranges, value_codes, value_ranges, width, added
    )


_attend_codes.register_fake(shapes.attend_codes)


def attend_codes(
    rows: Tensor, base: Tensor, key: Quantized, value: Quantized, added: Tensor | None
) -> Sums:
    """See `reference.quantized_attention.attend_codes`."""
    width = value.centre.shape[-1]
    return Sums(*_attend_codes(rows, base, *key[:2], *value[:2], width, added))
