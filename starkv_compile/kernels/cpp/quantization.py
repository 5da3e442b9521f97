"""Quantization in C++: rows are turned by sums and differences, without a product."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from ..reference import quantization as reference
from .build import library, pointer

SOURCE = Path(__file__).with_suffix(".cpp")
_NUMBERS = (
    "groups",
    "tokens",
    "stride",
    "dim",
    "block",
    "bytes",
    "most",
    "bfloat16",
    "threads",
)


class _Work(ctypes.Structure):
    """`struct Work` of the source."""

    _fields_ = [(name, ctypes.c_int64) for name in _NUMBERS]


def centre_of(rows: torch.Tensor) -> torch.Tensor:
    """As `reference.quantization.centre_of`, on values, not while a graph is traced."""
    rows = _readable(rows)
    centre = rows.new_empty(*rows.shape[:2], 1, rows.shape[-1], dtype=torch.float32)
    work = _work(rows, rows.shape[-1], 0)
    library(SOURCE).starkv_centre(ctypes.byref(work), pointer(rows), pointer(centre))
    return centre


def codes_and_ranges(
    rows: torch.Tensor, centre: torch.Tensor, nbits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.quantization.codes_and_ranges`, on values, not while a graph is traced.

    Ranges of float16 rows are float16, which not every compiler has: the reference makes them.
    """
    if rows.dtype == torch.float16:
        return reference.codes_and_ranges(rows, centre, nbits)
    dtype = reference.range_dtype(rows.dtype)
    rows, centre = _readable(rows), centre.contiguous()
    width = reference.coded_width(rows.shape[-1], nbits)
    codes = rows.new_empty(*rows.shape[:3], width, dtype=torch.uint8)
    ranges = rows.new_empty(*rows.shape[:3], 2, dtype=dtype)
    work = _work(rows, width, 2**nbits - 1)
    library(SOURCE).starkv_quantize(
        ctypes.byref(work), *map(pointer, (rows, centre, codes, ranges))
    )
    return codes, ranges


def _readable(rows: torch.Tensor) -> torch.Tensor:
    """The same rows, one group's after another, in a dtype that the source reads."""
    rows = rows if rows.dtype == torch.bfloat16 else rows.float()
    batch, group, token, number = rows.stride()
    even = batch == rows.shape[1] * group and (token, number) == (rows.shape[-1], 1)
    return rows if even else rows.clone(memory_format=torch.contiguous_format)


def _work(rows: torch.Tensor, width: int, most: int) -> _Work:
    batch, groups, tokens, dim = rows.shape
    return _Work(
        batch * groups,
        tokens,
        rows.stride(1),
        dim,
        dim & -dim,
        width,
        most,
        rows.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
