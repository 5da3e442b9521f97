"""Attention over codes of 8 or 4 bits, which become numbers in registers.

A program reads some tokens of one KV head, once for all of its query rows. What the programs of a
head have summed is added afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from ..reference.quantization import Quantized
from ..reference.quantized_attention import Sums
from .launch import BIG, LOG2E, launch, padded

PART = 256  # tokens of a program
TILE = 64  # tokens in registers at a time
MOST_ROWS = 64


def product() -> str:
    """How `tl.dot` multiplies. Codes are exact in any way, and queries as precise as in float16."""
    return "ieee" if torch.version.hip else "tf32"


@triton.jit
def _load_codes(codes, tokens, inside, BYTES: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    known = inside[:, None] & (place < BYTES)[None, :]
    return tl.load(codes + tokens[:, None] * BYTES + place[None, :], mask=known, other=0)


@triton.jit
def _load_ranges(ranges, tokens, inside):
    low = tl.load(ranges + tokens * 2, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(ranges + tokens * 2 + 1, mask=inside, other=0.0).to(tl.float32)
    return low, step


@triton.jit
def _load_plane(
    rows, row, known, plane, PLANES: tl.constexpr, BYTES: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.arange(0, BLOCK)
    inside = known[:, None] & (place < BYTES)[None, :]
    start = rows + (row * PLANES + plane)[:, None] * BYTES
    return tl.load(start + place[None, :], mask=inside, other=0.0)


@triton.jit
def attend_part(
    query,
    base,
    key_codes,
    key_ranges,
    value_codes,
    value_ranges,
    added,
    weighted,
    total,
    top,
    tokens,
    parts,
    stride_ab,
    stride_ag,
    stride_ar,
    stride_al,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    PLANES: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    ADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """weighted [B * G, parts, ROWS, PLANES, VALUE_BYTES]; total, top [B * G, parts, ROWS].

    Query rows [B * G, ROWS, PLANES, KEY_BYTES] and base [B * G, ROWS] are in powers of two.
    """
    part, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    known = rows < ROWS
    first = _load_plane(query, group * ROWS + rows, known, 0, PLANES, KEY_BYTES, BLOCK_KEY)
    asked = tl.sum(first, axis=1)
    if PLANES == 2:
        second = _load_plane(query, group * ROWS + rows, known, 1, PLANES, KEY_BYTES, BLOCK_KEY)
        asked += tl.sum(second, axis=1)
    offset = tl.load(base + group * ROWS + rows, mask=known, other=0.0)
    largest = tl.full([BLOCK_ROWS], -BIG, tl.float32)
    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    lows = tl.zeros([BLOCK_ROWS], tl.float32)
    out_first = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    out_second = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    for start in range(0, PART, TILE):
        token = part * PART + start + tl.arange(0, TILE)
        inside = token < tokens
        here = group * tokens + token
        low, step = _load_ranges(key_ranges, here, inside)
        codes = _load_codes(key_codes, here, inside, KEY_BYTES, BLOCK_KEY)
        if PLANES == 2:
            upper = tl.trans((codes >> 4).to(tl.float32))
            codes = codes & 15
        logits = tl.dot(first, tl.trans(codes.to(tl.float32)), input_precision=PRECISION)
        if PLANES == 2:
            logits += tl.dot(second, upper, input_precision=PRECISION)
        logits = logits * step[None, :] + asked[:, None] * low[None, :] + offset[:, None]
        if ADDED:
            places = (
                group // GROUPS * stride_ab
                + group % GROUPS * stride_ag
                + rows[:, None] * stride_ar
                + token[None, :] * stride_al
            )
            shown = tl.load(added + places, mask=known[:, None] & inside[None, :], other=0.0)
            logits += shown * LOG2E
        logits = tl.where(inside[None, :], logits, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, axis=1))
        fading = tl.exp2(largest - new)
        factors = tl.exp2(logits - new[:, None])
        largest = new
        low, step = _load_ranges(value_ranges, here, inside)
        sums = sums * fading + tl.sum(factors, axis=1)
        lows = lows * fading + tl.sum(factors * low[None, :], axis=1)
        factors *= step[None, :]
        codes = _load_codes(value_codes, here, inside, VALUE_BYTES, BLOCK_VALUE)
        if PLANES == 2:
            upper = (codes >> 4).to(tl.float32)
            codes = codes & 15
            out_second *= fading[:, None]
            out_second += tl.dot(factors, upper, input_precision=PRECISION)
        out_first *= fading[:, None]
        out_first += tl.dot(factors, codes.to(tl.float32), input_precision=PRECISION)
    row = (group * parts + part) * ROWS + rows
    tl.store(total + row, sums, mask=known)
    tl.store(top + row, largest, mask=known)
    place = tl.arange(0, BLOCK_VALUE)
    stored = known[:, None] & (place < VALUE_BYTES)[None, :]
    target = weighted + row[:, None] * (PLANES * VALUE_BYTES) + place[None, :]
    tl.store(target, out_first + lows[:, None], mask=stored)
    if PLANES == 2:
        tl.store(target + VALUE_BYTES, out_second + lows[:, None], mask=stored)


def attend_codes(
    rows: torch.Tensor,
    base: torch.Tensor,
    key: Quantized,
    value: Quantized,
    added: torch.Tensor | None,
) -> Sums:
    """As `reference.quantized_attention.attend_codes`."""
    batch, groups, number, dim = rows.shape
    tokens, key_bytes = key.codes.shape[2:]
    value_bytes, width = value.codes.shape[-1], value.centre.shape[-1]
    planes = 1 if (key_bytes, value_bytes) == (dim, width) else 2
    query = F.pad(rows * LOG2E.value, (0, planes * key_bytes - dim)).contiguous()
    strides: tuple[int, ...] = (0, 0, 0, 0)
    shown = base
    if added is not None:
        shown = added
        strides = tuple(
            0 if size == 1 else stride
            for size, stride in zip(added.shape, added.stride(), strict=True)
        )
    parts = triton.cdiv(tokens, PART)
    weighted = rows.new_empty(batch, groups, parts, number, planes * value_bytes)
    total = rows.new_empty(batch, groups, parts, number, 1)
    top = rows.new_empty(batch, groups, parts, number, 1)
    block_rows = min(MOST_ROWS, padded(number))
    widest = padded(max(key_bytes, value_bytes)) * planes
    launch(
        attend_part,
        (parts, batch * groups, triton.cdiv(number, block_rows)),
        query,
        (base * LOG2E.value).contiguous(),
        key.codes.contiguous(),
        key.ranges.contiguous(),
        value.codes.contiguous(),
        value.ranges.contiguous(),
        shown,
        weighted,
        total,
        top,
        tokens,
        parts,
        *strides,
        GROUPS=groups,
        ROWS=number,
        PLANES=planes,
        KEY_BYTES=key_bytes,
        VALUE_BYTES=value_bytes,
        BLOCK_KEY=padded(key_bytes),
        BLOCK_VALUE=padded(value_bytes),
        BLOCK_ROWS=block_rows,
        PART=PART,
        TILE=TILE if widest <= 128 else TILE // 4,
        ADDED=added is not None,
        PRECISION=product(),
        num_warps=4,
        num_stages=2,
    )
    # Powers of two become those of e with the largest logit alone: the factors stay as they are.
    most = top.amax(2, keepdim=True)
    share = torch.exp2(top - most)
    weighted, total = (weighted * share).sum(2), (total * share).sum(2)
    return Sums(weighted[..., :width], total, most[:, :, 0] / LOG2E.value)
