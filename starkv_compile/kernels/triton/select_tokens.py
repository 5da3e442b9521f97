"""Exact selection by radix: the k largest scores of a row, their indices ascending.

Scores are read as unsigned integers of the same order, 11 + 11 + 10 bits at a time. A launch
counts one digit over all rows; the next reads those counts and goes on among the scores that
share the digit of the k-th. No sort, no candidate buffer that could overflow, no waiting.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.capacity import split_capacity
from .launch import launch, padded

BLOCK = 1024
DIGITS = 3
BINS = 2048  # of the first two digits; the last has 1,024


@triton.jit
def _ordered(score, shown):
    """uint32 in the order of the scores; not finite: below every finite one; padding: below all.

    It takes values: of a function that loads, a compiler assumes that it may store.
    """
    usable = (score == score) & (tl.abs(score) < float("inf"))
    score = tl.where(usable, score, -3.4028234663852886e38) + 0.0  # -0 ties with +0
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ -1, bits | -2147483648).to(tl.uint32, bitcast=True)
    return tl.where(shown != 0, ordered, 0)


@triton.jit
def _narrow(counts, row, rows, wanted, DIGIT: tl.constexpr, BINS: tl.constexpr):
    """(prefix, wanted): the digits of the k-th largest score so far, and k among those equal."""
    bins = tl.arange(0, BINS)
    prefix = tl.zeros([], tl.int32)
    for digit in tl.static_range(DIGIT):
        here = tl.load(counts + (digit * rows + row) * BINS + bins)
        larger = tl.sum(here, axis=0) - tl.cumsum(here, axis=0)
        found = (larger < wanted) & (wanted <= larger + here)
        wanted -= tl.sum(tl.where(found, larger, 0), axis=0)
        prefix = (prefix << (10 if digit == 2 else 11)) | tl.sum(tl.where(found, bins, 0), axis=0)
    return prefix.to(tl.uint32, bitcast=True), wanted


@triton.jit
def count_digit(
    scores,
    real,
    counts,
    past,
    length,
    wanted,
    DIGIT: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """counts [DIGITS, B, BINS]: how many scores with the k-th one's earlier digits have each."""
    SHIFT: tl.constexpr = 21 if DIGIT == 0 else (10 if DIGIT == 1 else 0)
    BITS: tl.constexpr = 10 if DIGIT == 2 else 11
    row, rows = tl.program_id(1), tl.num_programs(1)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < past
    score = tl.load(scores + row * past + places, mask=inside, other=0.0)
    shown = tl.full([BLOCK], 1, tl.uint8)
    if REAL:
        shown = tl.load(real + row * length + places, mask=inside, other=0)
    ordered = _ordered(score, shown)
    if DIGIT > 0:
        prefix, _ = _narrow(counts, row, rows, wanted, DIGIT, BINS)
        inside = inside & ((ordered >> (SHIFT + BITS)) == prefix)
    digit = ((ordered >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
    ones = tl.full([BLOCK], 1, tl.int32)
    tl.atomic_add(counts + (DIGIT * rows + row) * BINS + digit, ones, mask=inside)


@triton.jit
def count_tile(
    scores,
    real,
    counts,
    tile_counts,
    past,
    length,
    wanted,
    tiles,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    REAL: tl.constexpr,
):
    """tile_counts [B, 2, tiles]: of each tile, the scores above the k-th, and equal to it."""
    row, rows = tl.program_id(1), tl.num_programs(1)
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < past
    score = tl.load(scores + row * past + places, mask=inside, other=0.0)
    shown = tl.full([BLOCK], 1, tl.uint8)
    if REAL:
        shown = tl.load(real + row * length + places, mask=inside, other=0)
    ordered = _ordered(score, shown)
    kth, _ = _narrow(counts, row, rows, wanted, 3, BINS)
    above = ((ordered > kth) & inside).to(tl.int32)
    equal = ((ordered == kth) & inside).to(tl.int32)
    out = tile_counts + row * 2 * tiles + tl.program_id(0)
    tl.store(out, tl.sum(above, axis=0))
    tl.store(out + tiles, tl.sum(equal, axis=0))


@triton.jit
def write_kept(
    scores,
    real,
    counts,
    tile_counts,
    kept,
    past,
    length,
    selected,
    tiles,
    WINDOW: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_WINDOW: tl.constexpr,
    REAL: tl.constexpr,
):
    """kept [B, selected + WINDOW]: places above the k-th, the first ones equal, the window."""
    tile, row, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    places = tile * BLOCK + tl.arange(0, BLOCK)
    inside = places < past
    score = tl.load(scores + row * past + places, mask=inside, other=0.0)
    shown = tl.full([BLOCK], 1, tl.uint8)
    if REAL:
        shown = tl.load(real + row * length + places, mask=inside, other=0)
    ordered = _ordered(score, shown)
    kth, ties = _narrow(counts, row, rows, selected, 3, BINS)
    above = ((ordered > kth) & inside).to(tl.int32)
    equal = ((ordered == kth) & inside).to(tl.int32)
    above_before = tl.zeros([], tl.int32)
    equal_before = tl.zeros([], tl.int32)
    for first in range(0, tile, BLOCK_TILES):
        others = first + tl.arange(0, BLOCK_TILES)
        before = tile_counts + row * 2 * tiles + others
        above_before += tl.sum(tl.load(before, mask=others < tile, other=0), axis=0)
        equal_before += tl.sum(tl.load(before + tiles, mask=others < tile, other=0), axis=0)
    rank = equal_before + tl.cumsum(equal, axis=0) - equal  # among the equal ones
    taken = (above != 0) | ((equal != 0) & (rank < ties))
    slot = above_before + tl.cumsum(above, axis=0) - above + tl.minimum(rank, ties)
    out = kept + row * (selected + WINDOW)
    tl.store(out + slot, places.to(tl.int64), mask=taken)
    if tile == 0:
        last = tl.arange(0, BLOCK_WINDOW)
        tl.store(out + selected + last, (past + last).to(tl.int64), mask=last < WINDOW)


def select_tokens(
    scores: torch.Tensor, real: torch.Tensor | None, length: int, window: int, capacity: int
) -> torch.Tensor:
    """As `reference.selection.select_tokens`."""
    batch, past = scores.shape
    selected, window = split_capacity(length, window, capacity)
    scores = scores.float().contiguous()
    masked = real is not None
    shown = scores if real is None else real.to(torch.uint8).contiguous()
    tiles = triton.cdiv(past, BLOCK)
    grid = (tiles, batch)
    counts = torch.zeros(DIGITS, batch, BINS, dtype=torch.int32, device=scores.device)
    constants = {"BINS": BINS, "BLOCK": BLOCK, "REAL": masked, "num_warps": 8}
    for digit in range(DIGITS):
        launch(
            count_digit,
            grid,
            scores,
            shown,
            counts,
            past,
            length,
            selected,
            DIGIT=digit,
            **constants,
        )
    tile_counts = torch.empty(batch, 2, tiles, dtype=torch.int32, device=scores.device)
    launch(
        count_tile,
        grid,
        scores,
        shown,
        counts,
        tile_counts,
        past,
        length,
        selected,
        tiles,
        **constants,
    )
    kept = torch.empty(batch, selected + window, dtype=torch.int64, device=scores.device)
    launch(
        write_kept,
        grid,
        scores,
        shown,
        counts,
        tile_counts,
        kept,
        past,
        length,
        selected,
        tiles,
        WINDOW=window,
        BLOCK_TILES=64,
        BLOCK_WINDOW=padded(window, 1),
        **constants,
    )
    return kept
