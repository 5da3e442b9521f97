"""What each token of a prompt is, read from values in a graph."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .roots import rounded_root

Described = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def layout_from_positions(positions: torch.Tensor) -> Described:
    """Reads M-RoPE position ids, [3, B, S] (time, height, width) or [4, B, S], text first.

    Text tokens have three equal coordinates that grow by one. Neighbours in a frame share their
    time and differ in height or width (padding repeats all three). A frame of a single token
    looks like text.

    Returns:
        frame, row, column [B, S] and current [B, S], as in `star.Layout`.
    """
    time, height, width = positions[-3], positions[-2], positions[-1]
    moved = (height[:, 1:] != height[:, :-1]) | (width[:, 1:] != width[:, :-1])
    same = (time[:, 1:] == time[:, :-1]) & moved
    same_as_last = F.pad(same, (1, 0))
    visual = same_as_last | F.pad(same, (0, 1))
    frame = _number(visual, visual & ~same_as_last)
    return (
        frame,
        _from_edge(height, frame, visual),
        _from_edge(width, frame, visual),
        newest_places(frame, visual),
    )


def layout_from_image_mask(is_image: torch.Tensor) -> Described:
    """Reads the mask that merges image embeddings, [B, S] bool. Returns the same.

    Each run of image tokens is a frame. The mask does not show its shape, so it counts as a square.
    """
    started = F.pad(is_image[:, :-1], (1, 0))
    frame = _number(is_image, is_image & ~started)
    place = torch.arange(is_image.shape[1], device=is_image.device).expand_as(frame)
    offset = _from_edge(place, frame, is_image)
    slot = frame.clamp(min=0)
    count = torch.zeros_like(frame).scatter_add(1, slot, is_image.long()).gather(1, slot)
    height = rounded_root(count.clamp(min=1))
    width = (count + height - 1) // height
    width = width.clamp(min=1)
    return frame, offset // width, offset % width, newest_places(frame, is_image)


def layout_all_text(key: torch.Tensor) -> Described:
    """The layout of a prompt about which nothing is known. key: [B, G, L, D], for its shape."""
    batch, _, length, _ = key.shape
    frame = torch.full((batch, length), -1, dtype=torch.int64, device=key.device)
    nothing = torch.full((batch, 1), -1, dtype=torch.int64, device=key.device)
    return frame, torch.zeros_like(frame), torch.zeros_like(frame), nothing


def _number(visual: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """[B, S]: which frame, counted from 0; -1 for text."""
    return torch.where(visual, starts.long().cumsum(1) - 1, -1)


def _from_edge(value: torch.Tensor, frame: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """[B, S]: value minus the least value of the token's frame; 0 for text."""
    big = torch.iinfo(torch.int64).max
    slot = frame.clamp(min=0)
    least = torch.full_like(value, big)
    least = least.scatter_reduce(1, slot, value.masked_fill(~visual, big), "amin")
    return torch.where(visual, value - least.gather(1, slot), 0)


def newest_places(frame: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """[B, S]: places of each row's newest frame's tokens in order, then -1."""
    flags = visual & (frame == frame.amax(1, keepdim=True))
    order = flags.long().sort(dim=1, descending=True, stable=True).indices
    slot = torch.arange(flags.shape[1], device=flags.device)
    return torch.where(slot < flags.sum(1, keepdim=True), order, -1)
