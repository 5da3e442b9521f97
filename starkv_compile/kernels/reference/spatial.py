"""The spatial axis: boost of the current frame, and mutual information of each subspace."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .roots import rounded_root

RankHistogram = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Information = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

VALUE_BINS = 16
GRID_BINS = 12
GUARD = 1e-12
"""Added to a share before its logarithm, as in the paper's release."""


def boost(hidden: torch.Tensor, valid: torch.Tensor, temperature: float) -> torch.Tensor:
    """Softmax of the standardised hidden norms of the current frame's tokens.

    Args:
        hidden: [B, N, E], what the key projection read, at the current frame's tokens.
        valid: [B, N] bool, False at padding.
        temperature: of the softmax.

    Returns:
        [B, N] float32, sums to 1 over the valid tokens, 0 elsewhere. A norm that is not finite
        counts as the mean.
    """
    norm = hidden.float().norm(dim=-1)
    usable = valid & norm.isfinite()
    norm = norm.where(usable, 0.0)
    count = usable.sum(-1, keepdim=True)
    mean = norm.sum(-1, keepdim=True) / count.clamp(min=1)
    spread = (norm - mean).where(usable, 0.0)
    deviation = (spread.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    logits = spread / (deviation + 1e-8) / temperature
    logits = logits.masked_fill(~valid, float("-inf"))
    weights = (logits - logits.amax(-1, keepdim=True).nan_to_num(neginf=0.0)).exp()
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)


def square_grid(valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, column) [B, N] of a frame that counts as a square, as in the paper's release."""
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    height = rounded_root(count)
    width = (count + height - 1) // height
    offset = torch.arange(valid.shape[-1], device=valid.device)
    return offset // width, offset % width


def rank_histogram(scores: torch.Tensor, place: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Counts valid tokens for each pair of a bin of score rank and a place.

    scores [B, G, N] float32, place [B, N] in 0..143, valid [B, N] bool, a row's valid tokens
    first. Returns [B, G, 16, 144] int32.
    """
    value = value_bins(scores, valid)
    places = GRID_BINS * GRID_BINS
    batch, groups, _ = scores.shape
    empty = torch.zeros(batch, groups, VALUE_BINS * places, dtype=torch.int32, device=scores.device)
    ones = valid[:, None].expand(-1, groups, -1).int()
    joint = empty.scatter_add(-1, value * places + place[:, None], ones)
    return joint.view(batch, groups, VALUE_BINS, places)


def value_bins(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The bin of each token's rank, of 16 bins of equal mass. As above -> [B, G, N] int64."""
    count = valid.sum(-1).clamp(min=1)[:, None, None]
    ordered = scores.masked_fill(~valid[:, None], float("inf"))
    order = ordered.sort(dim=-1, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, _positions(order))
    return (rank * VALUE_BINS // count).clamp(max=VALUE_BINS - 1)


def information(joint: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Mutual information, in nats, of counts joint [B, G, 16, 144] that sum to count [B].

    It uses float64, because it is a small difference of large sums. Returns [B, G] float32, not
    negative.
    """
    share = joint.double() / count.clamp(min=1)[:, None, None, None]
    product = share.sum(-1, keepdim=True) * share.sum(-2, keepdim=True)
    terms = share * ((share + GUARD).log() - (product + GUARD).log())
    return terms.sum((-1, -2)).clamp(min=0).float()


class Counting(NamedTuple):
    """The implementations of the two parts of mutual information to use."""

    ranks: RankHistogram = rank_histogram
    information: Information = information


REFERENCE = Counting()


def mutual_information(
    scores: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    valid: torch.Tensor,
    counting: Counting = REFERENCE,
) -> torch.Tensor:
    """Mutual information, in nats, between a token's score rank and its place on the screen.

    Ranks are cut into 16 bins of equal mass, the screen into 12 x 12. Equal scores rank by
    index.

    Args:
        scores: [B, G, N] group scores of the current frame's tokens.
        row, column: [B, N] place on the grid.
        valid: [B, N] bool, a row's valid tokens first.
        counting: see there.

    Returns:
        [B, G] float32; 0 where a group has no mass on the frame.
    """
    place = GRID_BINS * _screen_bin(row, valid) + _screen_bin(column, valid)
    joint = counting.ranks(scores, place, valid)
    found = counting.information(joint, valid.sum(-1))
    mass = scores.masked_fill(~valid[:, None], 0.0).sum(-1)
    return torch.where(mass > 1e-12, found, 0.0)


def _positions(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(like.shape[-1], device=like.device).expand_as(like)


def _screen_bin(index: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """floor(12 (index + 1/2) / cells), in integers; `cells` is one more than the largest index."""
    cells = index.masked_fill(~valid, 0).amax(-1, keepdim=True) + 1
    return (GRID_BINS * (2 * index + 1) // (2 * cells)).clamp(0, GRID_BINS - 1)


def mi_weights(mi: torch.Tensor, temperature: float) -> torch.Tensor:
    """Softmax over groups of the min-max scaled mutual information. mi [B, G] -> [B, G]."""
    low, high = mi.amin(-1, keepdim=True), mi.amax(-1, keepdim=True)
    span = high - low
    scaled = torch.where(span > 0, (mi - low) / span.clamp(min=1e-30), 0.5)
    return torch.softmax(scaled / temperature, dim=-1)
