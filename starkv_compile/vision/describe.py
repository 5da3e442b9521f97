"""Finds out what each token of a call is, from the arguments of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..kernels.reference.layout import layout_from_image_mask, layout_from_positions
from .image_shapes import deal_out, image_shapes

Described = tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]


def describe(config: Any, named: Mapping[str, Any]) -> Described | None:
    """Returns frame (from 0), row and column [B, S] of the chunk, and where they come from.

    None: nothing says which tokens are visual.
    """
    is_image = _image_tokens(config, named)
    positions = named.get("position_ids")
    if is_image is not None:
        by_grid = deal_out(is_image, image_shapes(is_image, named))
        if by_grid is not None:
            return (*by_grid, "grid")
    if isinstance(positions, torch.Tensor) and positions.dim() == 3 and len(positions) >= 3:
        frame, row, column, _ = layout_from_positions(positions)
        # A frame of one token looks like text in its positions: trust these if both sources agree.
        if is_image is None or torch.equal(frame >= 0, is_image):
            return frame, row, column, "positions"
    if is_image is None:
        return None
    frame, row, column, _ = layout_from_image_mask(is_image)
    return frame, row, column, "square"


def _image_tokens(config: Any, named: Mapping[str, Any]) -> torch.Tensor | None:
    """[B, S] bool, or None where neither token ids nor token types are given."""
    ids, types = named.get("input_ids"), named.get("mm_token_type_ids")
    if ids is None:
        embeds = named["inputs_embeds"]
        return types > 0 if types is not None and types.shape[1] == embeds.shape[1] else None
    names = ("image_token_id", "image_token_index", "video_token_id")
    known = [getattr(config, name, None) for name in names]
    markers = torch.tensor([t for t in known if isinstance(t, int)], device=ids.device)
    return torch.isin(ids, markers.to(ids.dtype))
