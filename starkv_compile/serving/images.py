"""What the tokens of a request show, from the images and videos that vLLM keeps of it."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..kernels.reference.layout import newest_places
from ..kernels.reference.star import Layout

KINDS = ("image", "video")


def layout_of(length: int, features: Any, device: torch.device, has_grids: bool = True) -> Layout:
    """Frame, row and column [1, length] of each token, and the newest frame's places.

    Args:
        length: tokens of the prompt.
        features: vLLM's `MultiModalFeatureSpec` of the request, or None.
        device: of the result.
        has_grids: whether shapes of pictures are read. False where vLLM drops the shapes of those
            that a prefix hit covers: the same prompt must always look the same.
    """
    frame = torch.full((1, length), -1, dtype=torch.int64)
    row, column = torch.zeros_like(frame), torch.zeros_like(frame)
    count = 0
    for feature in sorted(features or (), key=lambda one: one.mm_position.offset):
        if feature.modality not in KINDS:
            continue
        places = _places(feature.mm_position)
        frames, height, width = _grid(feature if has_grids else None, len(places))
        numbers = torch.arange(len(places))
        frame[0, places] = count + numbers // (height * width)
        row[0, places] = numbers // width % height
        column[0, places] = numbers % width
        count += frames
    current = newest_places(frame, frame >= 0)
    return Layout(*(tensor.to(device) for tensor in (frame, row, column, current)))


def beginning(layout: Layout, length: int) -> Layout:
    """The layout of the first `length` tokens. The newest frame may be cut."""
    frame, row, column = (t[:, :length] for t in layout[:3])
    return Layout(frame, row, column, newest_places(frame, frame >= 0))


def _places(position: Any) -> torch.Tensor:
    """Places of the tokens that show something; text between frames of a video does not."""
    places = torch.arange(position.length)
    if position.is_embed is not None:
        places = places[position.is_embed.cpu()]
    return places + position.offset


def _grid(feature: Any, tokens: int) -> tuple[int, int, int]:
    """Frames, rows and columns of `tokens` tokens. A picture of unknown shape counts as a square.

    A grid counts patches, of which several become one token.
    """
    name = "" if feature is None else f"{feature.modality}_grid_thw"
    if tokens and name and feature.data is not None and name in feature.data:
        frames, height, width = (int(n) for n in feature.data[name].data.reshape(-1)[:3])
        merge = math.isqrt(frames * height * width // tokens)
        if merge and frames * (height // merge) * (width // merge) == tokens:
            return frames, height // merge, width // merge
    height = max(1, round(math.sqrt(tokens)))
    return 1, height, max(1, -(-tokens // height))
