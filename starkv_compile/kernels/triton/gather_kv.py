"""Kept rows of keys and values into right-sized storage, both in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch, padded

BLOCK = 32


@triton.jit
def _copy(
    source,
    out,
    places,
    slots,
    inside,
    shown,
    batch,
    group,
    size,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    REAL: tl.constexpr,
):
    dims = tl.arange(0, BLOCK_DIM)
    copied = inside[:, None] & (dims < DIM)[None, :]
    read = copied & shown[:, None] if REAL else copied
    start = source + batch.to(tl.int64) * stride_b + group.to(tl.int64) * stride_h
    rows = tl.load(
        start + places[:, None] * stride_l + dims[None, :] * stride_d, mask=read, other=0.0
    )
    target = out + (batch * GROUPS + group).to(tl.int64) * size * DIM
    tl.store(target + slots[:, None] * DIM + dims[None, :], rows, mask=copied)


@triton.jit
def gather_rows(
    key,
    value,
    kept,
    real,
    key_out,
    value_out,
    size,
    length,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vl,
    stride_vd,
    GROUPS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """kept [B, size]; padding becomes zero."""
    batch, group = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slots < size
    places = tl.load(kept + batch.to(tl.int64) * size + slots, mask=inside, other=0)
    shown = inside
    if REAL:
        shown = tl.load(real + batch.to(tl.int64) * length + places, mask=inside, other=0) != 0
    if tl.program_id(2) == 0:
        _copy(
            key,
            key_out,
            places,
            slots,
            inside,
            shown,
            batch,
            group,
            size,
            stride_kb,
            stride_kh,
            stride_kl,
            stride_kd,
            GROUPS,
            KEY_DIM,
            BLOCK_KEY,
            REAL,
        )
    else:
        _copy(
            value,
            value_out,
            places,
            slots,
            inside,
            shown,
            batch,
            group,
            size,
            stride_vb,
            stride_vh,
            stride_vl,
            stride_vd,
            GROUPS,
            VALUE_DIM,
            BLOCK_VALUE,
            REAL,
        )


def gather_kv(
    key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor, real: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.selection.gather_kv`."""
    batch, groups, length, key_dim = key.shape
    value_dim, size = value.shape[-1], kept.shape[1]
    key_out = key.new_empty(batch, groups, size, key_dim)
    value_out = value.new_empty(batch, groups, size, value_dim)
    shown = kept if real is None else real.to(torch.uint8)
    launch(
        gather_rows,
        (triton.cdiv(size, BLOCK), batch * groups, 2),
        key,
        value,
        kept.contiguous(),
        shown,
        key_out,
        value_out,
        size,
        length,
        *key.stride(),
        *value.stride(),
        GROUPS=groups,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        BLOCK_KEY=padded(key_dim, 1),
        BLOCK_VALUE=padded(value_dim, 1),
        BLOCK=BLOCK,
        REAL=real is not None,
    )
    return key_out, value_out
