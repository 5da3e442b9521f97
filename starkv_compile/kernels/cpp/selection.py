"""Exact selection in C++, by counting instead of sorting."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from ..reference.capacity import split_capacity
from .build import library, pointer

SOURCE = Path(__file__).with_suffix(".cpp")


def select_tokens(
    scores: torch.Tensor, real: torch.Tensor | None, length: int, window: int, capacity: int
) -> torch.Tensor:
    """As `reference.selection.select_tokens`, on values, not while a graph is traced."""
    batch, past = scores.shape
    selected, _ = split_capacity(length, window, capacity)
    scores = scores.float().contiguous()
    if real is not None:
        real = real.expand(batch, length).contiguous()
    kept = torch.empty(batch, selected + length - past, dtype=torch.int64)
    kept[:, selected:] = torch.arange(past, length)
    numbers = (batch, past, length, selected, kept.shape[1])
    library(SOURCE).starkv_select(
        pointer(scores), pointer(real), pointer(kept), *map(ctypes.c_int64, numbers)
    )
    return kept
