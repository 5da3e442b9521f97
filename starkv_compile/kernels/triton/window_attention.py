"""Window attention in two passes over the keys, neither of which stores a logit.

A program keeps one tile of keys and walks the packed query rows of its KV head, row r being head
r // W of the group and window place r % W, so keys are read once a pass and never repeated.
The first pass finds each row's log-sum-exp and is left out where the caller has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..reference.capacity import clip_window
from .launch import BIG, LOG2E, launch, padded

NO_MASK, BOOL_MASK, ADDITIVE_MASK = 0, 1, 2


@dataclass(frozen=True)
class Tiles:
    """Block sizes of a program: packed query rows, keys; warps and pipeline stages."""

    rows: int = 64
    keys: int = 128
    warps: int = 4
    stages: int = 2


def tiles_of(dtype: torch.dtype) -> Tiles:
    """Blocks that fit the registers."""
    return Tiles(rows=32, keys=64) if dtype == torch.float32 else Tiles()


def exact_product() -> str:
    """How `tl.dot` multiplies float32: AMD's matrix units exactly, NVIDIA's in three parts.

    Without matrix units the products of a tile would not fit NVIDIA's registers.
    """
    return "ieee" if torch.version.hip else "tf32x3"


@triton.jit
def _load_keys(
    key,
    batch,
    head,
    keys,
    length,
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    dims = tl.arange(0, BLOCK_DIM)
    start = key + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    inside = (keys < length)[:, None] & (dims < DIM)[None, :]
    return tl.load(
        start + keys[:, None].to(tl.int64) * stride_l + dims[None, :] * stride_d,
        mask=inside,
        other=0.0,
    )


@triton.jit
def _logits(
    query,
    mask,
    key_tile,
    batch,
    first_head,
    rows,
    keys,
    past,
    length,
    scale,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_mb,
    stride_mh,
    stride_ms,
    stride_ml,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[rows, keys] in powers of two, -BIG where not visible. Beyond the keys: anything finite."""
    dims = tl.arange(0, BLOCK_DIM)
    head, step = (first_head + rows // WINDOW).to(tl.int64), rows % WINDOW
    known = rows < ROWS
    start = query + batch.to(tl.int64) * stride_qb
    tile = tl.load(
        start + head[:, None] * stride_qh + step[:, None] * stride_qs + dims[None, :] * stride_qd,
        mask=known[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )
    logits = tl.dot(tile, tl.trans(key_tile), input_precision=PRECISION)
    # A compiled graph passes Python's floats in double precision.
    logits *= tl.cast(scale, tl.float32)
    if MASK != 0:
        start = mask + batch.to(tl.int64) * stride_mb
        inside = known[:, None] & (keys < length)[None, :]
        places = head[:, None] * stride_mh + step[:, None] * stride_ms + keys[None, :] * stride_ml
        shown = tl.load(start + places, mask=inside, other=0)
        if MASK == 1:
            logits = tl.where(shown != 0, logits, -BIG)
        else:
            logits += shown.to(tl.float32) * LOG2E
    # A logit that is not a number counts as invisible, an infinite one as the largest finite.
    # (`tl.maximum` returns the other one where one is not a number.)
    logits = tl.minimum(tl.maximum(logits, -BIG), BIG)
    if CAUSAL:
        logits = tl.where(keys[None, :] <= past + step[:, None], logits, -BIG)
    return logits


@triton.jit
def row_sums(
    query,
    key,
    mask,
    partial_max,
    partial_sum,
    first_tile,
    tiles,
    past,
    length,
    scale,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_kd,
    stride_mb,
    stride_mh,
    stride_ms,
    stride_ml,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_SHARE: tl.constexpr,
    WINDOW: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """First pass: of each key tile and row, the largest logit and the sum of powers below it.

    partial_max, partial_sum: [B * GROUPS, tiles, HEADS * WINDOW].
    """
    ROWS: tl.constexpr = HEADS * WINDOW
    tile = tl.program_id(0) + first_tile
    batch, group = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS
    keys = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    key_tile = _load_keys(
        key,
        batch,
        group // KEY_SHARE,
        keys,
        length,
        stride_kb,
        stride_kh,
        stride_kl,
        stride_kd,
        DIM,
        BLOCK_DIM,
    )
    out = (tl.program_id(1).to(tl.int64) * tiles + tile) * ROWS
    for start in range(0, ROWS, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        logits = _logits(
            query,
            mask,
            key_tile,
            batch,
            group * HEADS,
            rows,
            keys,
            past,
            length,
            scale,
            stride_qb,
            stride_qh,
            stride_qs,
            stride_qd,
            stride_mb,
            stride_mh,
            stride_ms,
            stride_ml,
            ROWS,
            WINDOW,
            DIM,
            BLOCK_DIM,
            MASK,
            CAUSAL,
            PRECISION,
        )
        if CAUSAL or MASK != 0:  # the tiles that hold the last key
            logits = tl.where((keys < length)[None, :], logits, float("-inf"))
        largest = tl.max(logits, axis=1)
        total = tl.sum(tl.exp2(logits - largest[:, None]), axis=1)
        tl.store(partial_max + out + rows, largest, mask=rows < ROWS)
        tl.store(partial_sum + out + rows, total, mask=rows < ROWS)


@triton.jit
def combine_sums(
    partial_max,
    partial_sum,
    log_sum,
    tiles,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Base-2 log-sum-exp [B * GROUPS, ROWS] from the first pass's partial results."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = tl.program_id(1).to(tl.int64) * tiles * ROWS
    inside = rows < ROWS
    largest = tl.full([BLOCK_ROWS], -BIG, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, tiles, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        here = start + tile[:, None] * ROWS + rows[None, :]
        known = (tile < tiles)[:, None] & inside[None, :]
        theirs = tl.load(partial_max + here, mask=known, other=float("-inf"))
        sums = tl.load(partial_sum + here, mask=known, other=0.0)
        new = tl.maximum(largest, tl.max(theirs, axis=0))
        total = total * tl.exp2(largest - new)
        total += tl.sum(sums * tl.exp2(theirs - new[None, :]), axis=0)
        largest = new
    # A row that sees nothing does not vote: later powers of 2 minus infinity are zero.
    value = tl.where(largest > -BIG, largest + tl.log2(total), float("inf"))
    tl.store(log_sum + tl.program_id(1) * ROWS + rows, value, mask=inside)


@triton.jit
def score_keys(
    query,
    key,
    mask,
    log_sum,
    out,
    past,
    length,
    scale,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_kd,
    stride_mb,
    stride_mh,
    stride_ms,
    stride_ml,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_SHARE: tl.constexpr,
    WINDOW: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Second pass: out [B, GROUPS, past], softmax weights summed over window and heads / HEADS.

    No causal mask: the window's queries see every key before it.
    """
    ROWS: tl.constexpr = HEADS * WINDOW
    batch, group = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS
    keys = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    key_tile = _load_keys(
        key,
        batch,
        group // KEY_SHARE,
        keys,
        length,
        stride_kb,
        stride_kh,
        stride_kl,
        stride_kd,
        DIM,
        BLOCK_DIM,
    )
    weights = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
    for start in range(0, ROWS, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        logits = _logits(
            query,
            mask,
            key_tile,
            batch,
            group * HEADS,
            rows,
            keys,
            past,
            length,
            scale,
            stride_qb,
            stride_qh,
            stride_qs,
            stride_qd,
            stride_mb,
            stride_mh,
            stride_ms,
            stride_ml,
            ROWS,
            WINDOW,
            DIM,
            BLOCK_DIM,
            MASK,
            False,
            PRECISION,
        )
        total = tl.load(
            log_sum + tl.program_id(1) * ROWS + rows, mask=rows < ROWS, other=float("inf")
        )
        weights += tl.exp2(logits - total[:, None])
    score = tl.sum(weights, axis=0) / HEADS
    row = out + tl.program_id(1).to(tl.int64) * past
    tl.store(row + keys, score, mask=keys < past)


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    window: int,
    capacity: int,
    per_head: bool = False,
    log_sum_exp: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """As `reference.attention.window_attention`; log_sum_exp [B, H, S], natural, as SDPA's."""
    tiles = tiles or tiles_of(query.dtype)
    batch, query_heads, queries, dim = query.shape
    key_heads, length = key.shape[1], key.shape[2]
    window = clip_window(window, capacity, length)
    past = length - window
    groups = query_heads if per_head else key_heads
    heads = query_heads // groups
    rows = heads * window
    query = query[:, :, queries - window :]
    if mask is None:
        kind, shown = NO_MASK, query
        mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    else:
        kind = BOOL_MASK if mask.dtype == torch.bool else ADDITIVE_MASK
        # The window's rows only, in storage of their own: of a mask that is a graph's own value
        # a slice would keep the strides, and with them the size, of all of it.
        shown = mask[:, :, mask.shape[2] - window :]
        shown = (shown.to(torch.uint8) if kind == BOOL_MASK else shown).contiguous()
        mask_strides = tuple(
            0 if dimension == 1 else stride
            for dimension, stride in zip(shown.shape, shown.stride(), strict=True)
        )
    strides = (*query.stride(), *key.stride(), *mask_strides)
    constants = {
        "GROUPS": groups,
        "HEADS": heads,
        "KEY_SHARE": groups // key_heads,
        "WINDOW": window,
        "DIM": dim,
        "BLOCK_DIM": padded(dim),
        "BLOCK_ROWS": min(tiles.rows, padded(rows)),
        "BLOCK_KEYS": tiles.keys,
        "MASK": kind,
        "PRECISION": exact_product(),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    scale = scale * LOG2E.value
    if log_sum_exp is None:
        count = triton.cdiv(length, tiles.keys)
        partial_max = query.new_empty(batch * groups, count, rows, dtype=torch.float32)
        partial_sum = torch.empty_like(partial_max)
        log_sum = query.new_empty(batch * groups, rows, dtype=torch.float32)
        # Only the last tiles hold keys of the window, which not all of its queries see.
        before = past // tiles.keys if kind == NO_MASK else count
        for first, number, causal in ((0, before, False), (before, count - before, True)):
            if number:
                launch(
                    row_sums,
                    (number, batch * groups),
                    query,
                    key,
                    shown,
                    partial_max,
                    partial_sum,
                    first,
                    count,
                    past,
                    length,
                    scale,
                    *strides,
                    **constants,
                    CAUSAL=causal,
                )
        launch(
            combine_sums,
            (triton.cdiv(rows, 16), batch * groups),
            partial_max,
            partial_sum,
            log_sum,
            count,
            ROWS=rows,
            BLOCK_ROWS=16,
            BLOCK_TILES=64,
        )
    else:
        given = log_sum_exp[:, :, queries - window :].float()
        given = given.where(given.isfinite(), float("inf")) * LOG2E.value
        log_sum = given.reshape(batch * groups, rows).contiguous()
    out = query.new_empty(batch, groups, past, dtype=torch.float32)
    launch(
        score_keys,
        (triton.cdiv(past, tiles.keys), batch * groups),
        query,
        key,
        shown,
        log_sum,
        out,
        past,
        length,
        scale,
        *strides,
        **constants,
    )
    return out
