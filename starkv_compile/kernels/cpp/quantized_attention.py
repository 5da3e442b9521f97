"""Attention over codes in C++: each code is read once, for all query heads of its KV head."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch.nn import functional as F

from .build import library, pointer

SOURCE = Path(__file__).with_suffix(".cpp")
_NUMBERS = (
    "batch",
    "groups",
    "rows",
    "tokens",
    "key_bytes",
    "value_bytes",
    "added_batch",
    "added_group",
    "added_row",
    "bfloat16",
    "threads",
)
_POINTERS = ("query", "base", "keys", "values", "key_ranges", "value_ranges", "added")


class _Work(ctypes.Structure):
    """`struct Work` of the source."""

    _fields_ = [(name, ctypes.c_int64) for name in _NUMBERS] + [
        (name, ctypes.c_void_p) for name in _POINTERS
    ]


def attend_codes(
    rows: torch.Tensor,
    base: torch.Tensor,
    key_codes: torch.Tensor,
    key_ranges: torch.Tensor,
    value_codes: torch.Tensor,
    value_ranges: torch.Tensor,
    width: int,
    added: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.quantized_attention.attend_codes`, on values, not while a graph is traced.

    width: of the values, E.
    """
    code = library(SOURCE)
    lanes = code.starkv_lanes()
    batch, groups, number, dim = rows.shape
    rows, base = rows.float(), base.float()
    parts = (key_codes, key_ranges, value_codes, value_ranges)
    key_codes, key_ranges, value_codes, value_ranges = (
        part.expand(batch, groups, -1, -1).contiguous() for part in parts
    )
    planes = 1 if (key_codes.shape[-1], value_codes.shape[-1]) == (dim, width) else 2
    query = _in_planes(rows, key_codes.shape[-1], planes, lanes)
    bfloat16 = key_ranges.dtype == value_ranges.dtype == torch.bfloat16
    ranges = [given if bfloat16 else given.float() for given in (key_ranges, value_ranges)]
    base = base.contiguous()
    strides: tuple[int, ...] = (0, 0, 0)
    if added is not None:
        added = added.float().expand(-1, -1, -1, key_codes.shape[2])
        added = added if added.stride(-1) == 1 else added.contiguous()
        added = added.expand(batch, groups, number, -1)
        strides = added.stride()[:3]
    work = _Work(
        batch,
        groups,
        number,
        key_codes.shape[2],
        key_codes.shape[-1],
        value_codes.shape[-1],
        *strides,
        bfloat16,
        torch.get_num_threads(),
        *(t.data_ptr() for t in (query, base, key_codes, value_codes, *ranges)),
        0 if added is None else added.data_ptr(),
    )
    whole = -(-value_codes.shape[-1] // lanes) * lanes
    weighted = rows.new_empty(batch, groups, number, planes, whole)
    total, top = torch.empty_like(base), torch.empty_like(base)
    code.starkv_attend(
        ctypes.byref(work), ctypes.c_int64(planes), *map(pointer, (weighted, total, top))
    )
    weighted = weighted[..., : value_codes.shape[-1]].flatten(-2)[..., :width]
    return weighted.contiguous(), total, top


def _in_planes(rows: torch.Tensor, width: int, planes: int, lanes: int) -> torch.Tensor:
    """[..., planes, whole vectors] of rows [..., D]: `width` numbers a plane, then zeros."""
    if rows.shape[-1] == planes * width and width % lanes == 0:  # F.pad copies even by nothing
        return rows.unflatten(-1, (planes, width)).contiguous()
    filled = F.pad(rows, (0, planes * width - rows.shape[-1])).unflatten(-1, (planes, width))
    return F.pad(filled, (0, -width % lanes)).contiguous()
