"""Counting of score ranks and places in C++."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from ..reference.spatial import GRID_BINS, VALUE_BINS
from .build import library, pointer

SOURCE = Path(__file__).with_suffix(".cpp")


def rank_histogram(scores: torch.Tensor, place: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """As `reference.spatial.rank_histogram`, on values, not while a graph is traced."""
    batch, groups, tokens = scores.shape
    scores, place, valid = scores.contiguous(), place.contiguous(), valid.contiguous()
    joint = torch.zeros(batch, groups, VALUE_BINS, GRID_BINS * GRID_BINS, dtype=torch.int32)
    library(SOURCE).starkv_rank_histogram(
        *map(pointer, (scores, place, valid, joint)), *map(ctypes.c_int64, (batch, groups, tokens))
    )
    return joint
