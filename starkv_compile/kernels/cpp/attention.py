"""Window attention in C++: one pass over the keys, or two where no log-sum-exp is given."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from ..reference.attention import BOUNDS, window_logits
from ..reference.capacity import checked_window
from .build import library, pointer

SOURCE = Path(__file__).with_suffix(".cpp")
_POINTERS = ("query", "key", "mask")
_NUMBERS = (
    "batch",
    "groups",
    "heads",
    "window",
    "past",
    "dim",
    "key_batch",
    "key_head",
    "key_token",
    "key_share",
    "mask_batch",
    "mask_head",
    "bfloat16",
    "threads",
)


class _Work(ctypes.Structure):
    """`struct Work` of the source."""

    _fields_ = [(name, ctypes.c_int64) for name in _NUMBERS] + [
        (name, ctypes.c_void_p) for name in _POINTERS
    ]


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    window: int,
    capacity: int,
    per_head: bool = False,
    log_sum_exp: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.attention.window_attention`, on values, not while a graph is traced."""
    batch, query_heads, queries, dim = query.shape
    key_heads, length = key.shape[1], key.shape[2]
    window = checked_window(window, capacity, length, queries)
    past = length - window
    groups = query_heads if per_head else key_heads
    heads = query_heads // groups
    rows = heads * window
    packed = (query[:, :, -window:].float() * scale).reshape(batch, groups, rows, dim).contiguous()
    if key.dtype not in (torch.float32, torch.bfloat16):
        key = key.float()
    if key.stride(3) != 1:
        key = key.contiguous()
    shown = None
    if mask is not None:  # shared by rows or heads: a stride of 0
        shown = _added(mask[:, :, -window:].expand(-1, -1, window, length))
        shown = shown.expand(batch, query_heads, length, window)
    work = _Work(
        batch,
        groups,
        heads,
        window,
        past,
        dim,
        key.stride(0),
        key.stride(1),
        key.stride(2),
        groups // key_heads,
        *(shown.stride()[:2] if shown is not None else (0, 0)),
        key.dtype == torch.bfloat16,
        torch.get_num_threads(),
        packed.data_ptr(),
        key.data_ptr(),
        0 if shown is None else shown.data_ptr(),
    )
    if log_sum_exp is None:
        log_sum = _log_sum(work, packed, key, shown)
    else:
        given = log_sum_exp[:, :, -window:].float()
        log_sum = given.where(given.isfinite(), torch.inf).reshape(batch, groups, rows)
    log_sum = log_sum.contiguous()
    out = torch.empty(batch, groups, past, dtype=torch.float32)
    library(SOURCE).starkv_weigh(ctypes.byref(work), pointer(log_sum), pointer(out))
    return out


def _added(mask: torch.Tensor) -> torch.Tensor:
    """What a mask adds to the logits: [B|1, H|1, L, W] float32, a token's W numbers together."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return mask.float().transpose(2, 3).contiguous()


def _log_sum(
    work: _Work, packed: torch.Tensor, key: torch.Tensor, shown: torch.Tensor | None
) -> torch.Tensor:
    """[B, groups, rows]: log-sum-exp of all logits a row sees; infinite where it sees none."""
    batch, groups, rows, _ = packed.shape
    parts = library(SOURCE).starkv_parts(ctypes.c_int64(work.past))
    largest, total = torch.empty(2, batch, groups, parts, rows, dtype=torch.float32)
    library(SOURCE).starkv_row_sums(ctypes.byref(work), pointer(largest), pointer(total))
    key = key[:, :, work.past :].repeat_interleave(work.key_share, 1)
    if shown is not None:
        shown = shown[:, :, work.past :].transpose(2, 3).reshape(batch, groups, rows, -1)
    inside = window_logits(packed, key, shown, work.window)
    top = torch.maximum(largest.amax(2), inside.amax(3))
    total = (total * (largest - top[:, :, None]).exp()).sum(2)
    total = total + (inside - top[..., None]).exp().sum(3)
    return torch.where(top > BOUNDS.min, top + total.log(), torch.inf)
