"""The spatial axis: boost of the current frame, and mutual information of each subspace."""

from __future__ import annotations

import torch

VALUE_BINS = 16
GRID_BINS = 12


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
    """(row, column) [B, N] of a frame read as a square, as the paper's release does."""
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    height = count.double().sqrt().round().long()
    width = (count + height - 1) // height
    offset = torch.arange(valid.shape[-1], device=valid.device)
    return offset // width, offset % width


def mutual_information(
    scores: torch.Tensor, row: torch.Tensor, column: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """Mutual information, in nats, between a token's score rank and its place on the screen.

    Ranks are cut into 16 bins of equal mass, the screen into 12 x 12. Equal scores rank by
    index.

    Args:
        scores: [B, G, N] group scores of the current frame's tokens.
        row, column: [B, N] place on the grid.
        valid: [B, N] bool.

    Returns:
        [B, G] float32; 0 where a group has no mass on the frame.
    """
    batch, groups, _ = scores.shape
    count = valid.sum(-1)
    ordered = scores.masked_fill(~valid[:, None], float("inf"))
    order = ordered.sort(dim=-1, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, _positions(order))
    value_bin = rank * VALUE_BINS // count.clamp(min=1)[:, None, None]
    place = GRID_BINS * _screen_bin(row, valid) + _screen_bin(column, valid)
    places = GRID_BINS * GRID_BINS
    cell = value_bin.clamp(max=VALUE_BINS - 1) * places + place[:, None]
    ones = valid[:, None].expand(-1, groups, -1).double()
    joint = torch.zeros(
        batch, groups, VALUE_BINS * places, dtype=torch.double, device=scores.device
    ).scatter_add(-1, cell, ones)
    joint = (joint / count.clamp(min=1)[:, None, None]).view(batch, groups, VALUE_BINS, places)
    product = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    terms = joint * ((joint + 1e-12).log() - (product + 1e-12).log())
    mass = scores.masked_fill(~valid[:, None], 0.0).sum(-1)
    return torch.where(mass > 1e-12, terms.sum((-1, -2)).clamp(min=0), 0.0).float()


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
