"""Novelty in C++: it reads pairs of keys where they are, and nothing of their size is stored."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from ..reference.novelty import STANDS_FOR
from .build import library, pointer

SOURCE = Path(__file__).with_suffix(".cpp")
_NUMBERS = (
    "batch",
    "groups",
    "tokens",
    "dim",
    "of_batch",
    "of_group",
    "of_token",
    "bfloat16",
    "threads",
)


class _Keys(ctypes.Structure):
    """`struct Keys` of the source."""

    _fields_ = [(name, ctypes.c_int64) for name in _NUMBERS] + [("numbers", ctypes.c_void_p)]


def spatial_novelty(
    key: torch.Tensor,
    frame: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    earlier: torch.Tensor,
) -> torch.Tensor:
    """As `reference.novelty.spatial_novelty`, on values, not while a graph is traced."""
    key, before = _readable(key), earlier.shape[1]
    layout = [t.contiguous() for t in (frame, row, column)]
    out = torch.empty(key.shape[0], key.shape[2] - before, dtype=torch.float32)
    library(SOURCE).starkv_spatial(
        ctypes.byref(_keys(key)), *map(pointer, layout), ctypes.c_int64(before), pointer(out)
    )
    return torch.cat([earlier, out], 1)


def temporal_novelty(
    key: torch.Tensor,
    frame: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    current: torch.Tensor,
    stored: int,
) -> torch.Tensor:
    """As `reference.novelty.temporal_novelty`, on values, not while a graph is traced."""
    key = _readable(key)
    layout = [t.contiguous() for t in (frame, row, column, current)]
    out = torch.empty(key.shape[0], key.shape[2], dtype=torch.float32)
    library(SOURCE).starkv_temporal(
        ctypes.byref(_keys(key)),
        *map(pointer, layout),
        ctypes.c_int64(current.shape[1]),
        ctypes.c_int64(stored),
        ctypes.c_float(STANDS_FOR),
        pointer(out),
    )
    return out


def key_novelty(key: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """As `reference.novelty.key_novelty`, on values, not while a graph is traced."""
    key, among = _readable(key), among.contiguous()
    out = torch.empty(key.shape[0], key.shape[2], dtype=torch.float32)
    library(SOURCE).starkv_among(ctypes.byref(_keys(key)), pointer(among), pointer(out))
    return out


def _readable(key: torch.Tensor) -> torch.Tensor:
    """The same keys in a dtype that the source reads, a vector's numbers one after another."""
    key = key if key.dtype == torch.bfloat16 else key.float()
    return key if key.stride(3) == 1 else key.contiguous()


def _keys(key: torch.Tensor) -> _Keys:
    is_bfloat16 = key.dtype == torch.bfloat16
    threads = torch.get_num_threads()
    return _Keys(*key.shape, *key.stride()[:3], is_bfloat16, threads, key.data_ptr())
