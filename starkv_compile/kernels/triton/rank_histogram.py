"""Ranks of scores against places on the screen, counted: what mutual information is made of."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.spatial import GRID_BINS, VALUE_BINS
from .launch import launch

BLOCK = 128
COMPARED = 32  # scores that a program ranks its own against at a time


@triton.jit
def count_ranks(
    scores,
    place,
    count,
    joint,
    tokens,
    GROUPS: tl.constexpr,
    VALUES: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPARED: tl.constexpr,
):
    """A token's rank is the number of smaller scores, equal ones before it included.

    Counting compares all pairs: no sort, no order to wait for. Integer atomics only, so the
    result does not depend on which program comes first.
    """
    batch = tl.program_id(1) // GROUPS
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = tl.load(count + batch).to(tl.int32)
    row = scores + tl.program_id(1).to(tl.int64) * tokens
    own = tl.load(row + mine, mask=mine < real, other=0.0)
    rank = tl.zeros([BLOCK], tl.int32)
    # Later places than `real` hold nothing: layouts read off a graph are as wide as the prompt.
    for start in range(0, tl.where(tl.program_id(0) * BLOCK < real, real, 0), COMPARED):
        other = start + tl.arange(0, COMPARED)
        against = tl.load(row + other, mask=other < real, other=float("inf"))
        below = against[None, :] < own[:, None]
        tied = (against[None, :] == own[:, None]) & (other[None, :] < mine[:, None])
        counted = (below | tied) & (other < real)[None, :]
        rank += tl.sum(counted.to(tl.int32), axis=1)
    value = rank * VALUES // tl.maximum(real, 1)
    cell = value * PLACES + tl.load(place + batch * tokens + mine, mask=mine < real, other=0)
    ones = tl.full([BLOCK], 1, tl.int32)
    tl.atomic_add(joint + tl.program_id(1) * VALUES * PLACES + cell, ones, mask=mine < real)


def rank_histogram(scores: torch.Tensor, place: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """As `reference.spatial.rank_histogram`; the valid tokens of a row come first."""
    batch, groups, tokens = scores.shape
    places = GRID_BINS * GRID_BINS
    joint = torch.zeros(batch, groups, VALUE_BINS, places, dtype=torch.int32, device=scores.device)
    launch(
        count_ranks,
        (triton.cdiv(tokens, BLOCK), batch * groups),
        scores.float().contiguous(),
        place.to(torch.int32).contiguous(),
        valid.sum(-1),
        joint,
        tokens,
        GROUPS=groups,
        VALUES=VALUE_BINS,
        PLACES=places,
        BLOCK=BLOCK,
        COMPARED=COMPARED,
    )
    return joint
