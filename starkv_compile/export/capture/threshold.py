"""Finds the k-th largest value of a row exactly, by counting: with comparisons and sums.

Float32 values fall into 511 bins between powers of two, and a bin holds at most 2**23 evenly
spaced values. 23 x 23 comparisons find the bin. Then each step finds four bits of the place in it.
Every threshold is a float32, so the search meets the k-th value exactly, at any spread of values.
(Halving an interval of values would stop too early if some are a million times larger than others,
as attention sinks are.)
"""

from __future__ import annotations

import functools

import torch

from ...kernels.reference.spatial import VALUE_BINS

FANOUT = 23  # squared: no fewer than the bins
DIGITS = (4, 4, 4, 4, 4, 3)  # bits of a place in a bin


@functools.cache
def bins() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(first value, spacing) of each bin, ascending. The last one repeats up to 23 x 23.

    The order is: minus infinity, negative values by magnitude, negative subnormal values, zero and
    positive subnormal values, positive values.
    """
    first, step = [float("-inf"), torch.finfo(torch.float32).min], [0.0, 2.0**104]
    for power in range(126, -127, -1):  # from -2**(power + 1), short of -2**power
        first.append(-(2.0 ** (power + 1)))
        step.append(2.0 ** (power - 23))
    first += [-(2.0**-126), 0.0]
    step += [2.0**-149, 2.0**-149]
    for power in range(-126, 128):
        first.append(2.0**power)
        step.append(2.0 ** (power - 23))
    missing = FANOUT * FANOUT - len(first)
    return (*first, *[first[-1]] * missing), (*step, *[step[-1]] * missing)


def kth_largest(values: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """values [..., P] float32, no NaN, no plus infinity; k [..., K] in 1..P -> [..., K]."""
    first, step = (torch.tensor(t, dtype=torch.float32, device=values.device) for t in bins())
    group = _last_reached(values, k, first[::FANOUT].expand(*k.shape, FANOUT))
    within = torch.arange(FANOUT, device=values.device)
    places = group[..., None] * FANOUT + within
    place = group * FANOUT + _last_reached(values, k, first[places])
    low, spacing = first[place], step[place]
    left = sum(DIGITS)
    for bits in DIGITS:
        left -= bits
        ahead = torch.arange(1 << bits, device=values.device, dtype=values.dtype) * float(1 << left)
        reached = low[..., None] + spacing[..., None] * ahead
        low = reached.gather(-1, _last_reached(values, k, reached)[..., None])[..., 0]
    return low


def _last_reached(values: torch.Tensor, k: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """[..., K]: the last of `least` [..., K, T], ascending, that at least k values reach."""
    above = values[..., None, None, :] >= least[..., None]
    counts = above.int().sum(-1, dtype=torch.int64)
    return (counts >= k[..., None]).int().sum(-1, dtype=torch.int64) - 1


def among_largest(values: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Whether each value is one of the k largest, ties to the lowest index: bool [..., K, P]."""
    limit = kth_largest(values, k)[..., None]
    values = values[..., None, :]
    above, equal = values > limit, values == limit
    left = k[..., None] - above.int().sum(-1, keepdim=True, dtype=torch.int64)
    return above | (equal & (equal.long().cumsum(-1) <= left))


def compacted(chosen: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` chosen places of each row, ascending. [B, P] -> [B, count]."""
    batch, places = chosen.shape
    slot = torch.where(chosen, chosen.long().cumsum(-1) - 1, count)  # the last slot gets all others
    index = torch.arange(places, device=chosen.device).expand(batch, -1)
    found = torch.zeros(batch, count + 1, dtype=torch.int64, device=chosen.device)
    return found.scatter(1, slot, index)[:, :count]


def value_bins(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """`reference.spatial.value_bins` without sorting: a rank's bin is how many cuts it passes.

    A token is past a cut of r tokens if it is not among the r smallest, ties to the lowest index.
    """
    count = valid.sum(-1)
    cut = torch.arange(1, VALUE_BINS, device=scores.device)
    smaller = (cut * count[:, None] + VALUE_BINS - 1) // VALUE_BINS  # ranks below: [B, 15]
    smaller = smaller[:, None].expand(-1, scores.shape[1], -1)
    turned = (-scores).masked_fill(~valid[:, None], float("-inf"))
    inside = among_largest(turned, smaller.clamp(min=1)) & (smaller > 0)[..., None]
    return (~inside).long().sum(2)
