"""Shapes of what ops return, for graphs in which an op stays whole. Nothing is computed.

Each function takes the arguments of the op of its name. An op without one runs its reference on
tensors without contents, which takes a hundred times as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, float32, int64

from .reference.capacity import checked_window, split_capacity
from .reference.quantization import coded_width, ranges_of


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
    """[B, G or H, P] float32."""
    batch, heads, queries, _ = query.shape
    groups, length = key.shape[1], key.shape[2]
    past = length - checked_window(window, capacity, length, queries)
    return query.new_empty(batch, heads if per_head else groups, past, dtype=float32)


def novelty(key: Tensor, *others: Any) -> Tensor:
    """[B, L] float32, for an op whose first argument is the keys [B, G, L, D]."""
    return key.new_empty(key.shape[0], key.shape[2], dtype=float32)


def scores(attention: Tensor, *others: Any) -> Tensor:
    """[B, P] float32, for an op whose first argument is [B, G, P] or [B, P]."""
    return attention.new_empty(attention.shape[0], attention.shape[-1], dtype=float32)


def select_tokens(
    scores: Tensor, real: Tensor | None, length: int, window: int, capacity: int
) -> Tensor:
    """[B, C'] int64, or [B, G, C'] for scores of each head."""
    kept = sum(split_capacity(length, window, capacity))
    return scores.new_empty(*scores.shape[:-1], kept, dtype=int64)


def gather_kv(
    key: Tensor, value: Tensor, kept: Tensor, real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[B, G, C', D] of keys and of values."""
    batch, groups = key.shape[:2]
    rows = (batch, groups, kept.shape[-1])
    return key.new_empty(*rows, key.shape[-1]), value.new_empty(*rows, value.shape[-1])


def centre(rows: Tensor) -> Tensor:
    """[B, G, 1, D] float32."""
    return rows.new_empty(*rows.shape[:2], 1, rows.shape[-1], dtype=float32)


def quantize(rows: Tensor, centre: Tensor, nbits: int) -> tuple[Tensor, Tensor]:
    """Codes [B, G, C, D or half of it] uint8 and ranges [B, G, C, 2] in 16 bits."""
    *shape, dim = rows.shape
    codes = rows.new_empty(*shape, coded_width(dim, nbits), dtype=torch.uint8)
    return codes, ranges_of(rows.new_empty(*shape, 2), nbits, rows.dtype)


def dequantize(codes: Tensor, ranges: Tensor, centre: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, G, C, D] of `dtype`."""
    return centre.new_empty(*codes.shape[:3], centre.shape[-1], dtype=dtype)


def quantized_attention(query: Tensor, *others: Any) -> Tensor:
    """[B, H, S, E] of the query's dtype, for an op whose ninth argument is values [B, G, N, E]."""
    return query.new_empty(*query.shape[:3], others[7].shape[-1])


def attend_codes(
    rows: Tensor,
    base: Tensor,
    key_codes: Tensor,
    key_ranges: Tensor,
    value_codes: Tensor,
    value_ranges: Tensor,
    width: int,
    added: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, G, R, width], [B, G, R, 1] and [B, G, R, 1] float32."""
    return (
        rows.new_empty(*rows.shape[:3], width),
        base.new_empty(base.shape),
        base.new_empty(base.shape),
    )
