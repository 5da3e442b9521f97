"""Mutual information from operators that every runtime has, TensorRT included.

TensorRT has neither float64 nor a scatter that adds. So counts of pairs are the product of two
matrices of zeros and ones, exact in float32. Sums over logarithms are sums of whole numbers.
"""

from __future__ import annotations

import math

import torch

from ...kernels.reference.spatial import (
    GRID_BINS,
    GUARD,
    VALUE_BINS,
    Information,
    RankHistogram,
    value_bins,
)
from . import threshold

BITS = 40
"""Binary digits after the point of x log(x). There are fewer if the sums would exceed 63 bits."""


def histogram(value: torch.Tensor, place: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """How many valid tokens have each pair of bins, as in `reference.spatial.rank_histogram`.

    value [B, G, N] in 0..15, place [B, N] in 0..143, valid [B, N] bool -> [B, G, 16, 144] int32.
    """
    batch, groups, tokens = value.shape
    of_value = value[:, :, None] == torch.arange(VALUE_BINS, device=value.device)[:, None]
    of_place = place[..., None] == torch.arange(GRID_BINS * GRID_BINS, device=value.device)
    rows = (of_value & valid[:, None, None]).float().reshape(batch, groups * VALUE_BINS, tokens)
    joint = torch.matmul(rows, of_place.float())
    return joint.reshape(batch, groups, VALUE_BINS, GRID_BINS * GRID_BINS).int()


def ranks_by_sort(scores: torch.Tensor, place: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """`reference.spatial.rank_histogram`, with ranks from a stable sort."""
    return histogram(value_bins(scores, valid), place, valid)


def ranks_by_threshold(
    scores: torch.Tensor, place: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """The same without a sort."""
    return histogram(threshold.value_bins(scores, valid), place, valid)


RANKS: dict[str, RankHistogram] = {"topk": ranks_by_sort, "threshold": ranks_by_threshold}
"""The ranks for each form of selection."""


def information_by_table(longest: int) -> Information:
    """`reference.spatial.information` for frames of up to `longest` tokens, in integers.

    With counts c of pairs, r and q of their rows and columns, and n of all, n times the mutual
    information is n log n + sum c log c - sum r log r - sum q log q. A table has each term as a
    whole number of units of 2**-40, so the sums are exact in any order. The guard of 1e-12 in the
    logarithms enters to first order. The result differs from the float64 one by about 1e-12, which
    the rounding to float32 seldom shows.
    """
    bits = min(BITS, 61 - math.ceil(math.log2(longest * math.log(longest))))
    unit = 2.0**bits
    counts = torch.arange(longest + 1, dtype=torch.float64)
    table = (torch.special.xlogy(counts, counts) * unit).round().long()

    def information(joint: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        row, column = joint.sum(-1, dtype=torch.int64), joint.sum(-2, dtype=torch.int64)
        pairs = table[joint.long()].sum((-1, -2))
        total = table[count][:, None] + pairs - table[row].sum(-1) - table[column].sum(-1)
        among = count.clamp(min=1)[:, None]
        product = row.float()[..., None] * column.float()[..., None, :]
        share = joint.float() / product.clamp(min=1.0)
        guarded = (joint > 0).float().sum((-1, -2)) - among.float() * share.sum((-1, -2))
        found = total // among + (guarded * (GUARD * unit)).round().long()
        return found.clamp(min=0).float() / unit

    return information
