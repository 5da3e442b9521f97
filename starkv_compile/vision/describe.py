"""Describe a prompt's tokens to the cache, from what the caller hands to the model."""

from __future__ import annotations

from typing import Any

import torch

from ..cache.cache import StarKVCache
from ..errors import CacheError
from ..kernels.reference.layout import layout_from_image_mask, layout_from_positions
from .image_shapes import deal_out, image_shapes
from .layout import VisionLayout

Described = tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]


def describe_chunk(cache: StarKVCache, model: Any, named: dict[str, Any]) -> None:
    """Append the coming chunk to the session's layout, or leave the layout unknown.

    Sources, best first: the images' grids or sizes, M-RoPE position ids, token ids alone (frames
    read as squares). With none of them the graph pass looks for itself.
    """
    seen = cache.get_seq_length()
    check_padding(named.get("attention_mask"), seen)
    session = cache.session
    described = _describe(model.config, named)
    if described is None:
        session.layout = None
        return
    frame, row, column, grid = described
    if session.layout is None:
        session.layout = VisionLayout.empty(len(frame), frame.device)
        session.layout.pad_text(seen)
        left = max((layer.retired for layer in cache.compressed_layers), default=0)
        session.layout.counted[:, :left] = False  # which ones is not known any more
    session.layout.truncate(seen)
    session.layout.pad_text(seen)
    session.layout.extend(frame, row, column, grid, _real(named, seen, frame))


def check_padding(mask: Any, seen: int) -> None:
    """Raise `CacheError` for padding that a compacted cache cannot account for."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or bool(mask.all()):
        return
    if not bool(mask[:, -1].all()):
        raise CacheError(
            "attention_mask ends in zeros for some row: right-padded prompts cannot be compressed "
            "(the scoring window would be padding); tokenize with padding_side='left'"
        )
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise CacheError(
            "attention_mask has zeros after ones: padding between tokens cannot be told from "
            "tokens once a prompt is compressed; pad on the left, or leave those tokens out"
        )
    if seen and not bool(mask[:, seen:].all()):
        raise CacheError(
            "attention_mask pads the new tokens of a later turn; in a compressed cache they cannot "
            "be told from stored ones. Give all rows new prompts of one length, or each row a "
            "cache of its own"
        )


def _real(named: dict[str, Any], seen: int, frame: torch.Tensor) -> torch.Tensor | None:
    """[B, S] bool, False at the padding of a chunk after `seen` tokens; None: no such 2D mask."""
    mask, (batch, new) = named.get("attention_mask"), frame.shape
    if not isinstance(mask, torch.Tensor) or mask.shape != (batch, seen + new):
        return None
    return mask[:, seen:].to(frame.device) != 0


def _describe(config: Any, named: dict[str, Any]) -> Described | None:
    """frame (counted from 0), row, column [B, S] of the chunk, and where they come from."""
    is_image = _image_tokens(config, named)
    positions = named.get("position_ids")
    if is_image is not None:
        by_grid = deal_out(is_image, image_shapes(is_image, named))
        if by_grid is not None:
            return (*by_grid, "grid")
    if isinstance(positions, torch.Tensor) and positions.dim() == 3 and len(positions) >= 3:
        frame, row, column, _ = layout_from_positions(positions)
        # A frame of one token looks like text in its positions: trust them where they agree.
        if is_image is None or torch.equal(frame >= 0, is_image):
            return frame, row, column, "positions"
    if is_image is None:
        return None
    frame, row, column, _ = layout_from_image_mask(is_image)
    return frame, row, column, "square"


def _image_tokens(config: Any, named: dict[str, Any]) -> torch.Tensor | None:
    """[B, S] bool, or None where neither token ids nor token types are given."""
    ids, types = named.get("input_ids"), named.get("mm_token_type_ids")
    if ids is None:
        embeds = named["inputs_embeds"]
        return types > 0 if types is not None and types.shape[1] == embeds.shape[1] else None
    names = ("image_token_id", "image_token_index", "video_token_id")
    known = [getattr(config, name, None) for name in names]
    markers = torch.tensor([t for t in known if isinstance(t, int)], device=ids.device)
    return torch.isin(ids, markers.to(ids.dtype))
