"""The tokens of a coming call: described to the cache before a model stores them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import CacheError
from ..vision.describe import describe
from ..vision.layout import VisionLayout

if TYPE_CHECKING:
    from .cache import StarKVCache


def describe_chunk(cache: StarKVCache, model: Any, named: dict[str, Any]) -> None:
    """Append the coming chunk to the layout of the cache, or leave the layout unknown.

    Sources, best first: the images' grids or sizes, M-RoPE position ids, token ids alone (frames
    read as squares). With none of them the graph pass looks for itself.

    Args:
        named: what the model is called with.

    Raises:
        CacheError: the attention mask pads where a compacted cache cannot account for it.
    """
    seen = cache.get_seq_length()
    check_padding(named.get("attention_mask"), seen)
    shared = cache.shared
    described = describe(model.config, named)
    if described is None:
        shared.layout = None
        return
    frame, row, column, grid = described
    if shared.layout is None:
        shared.layout = VisionLayout.empty(len(frame), frame.device)
        shared.layout.pad_text(seen)
        left = max((layer.retired for layer in cache.compressed_layers), default=0)
        shared.layout.counted[:, :left] = False  # which ones is not known any more
    shared.layout.truncate(seen)
    shared.layout.pad_text(seen)
    shared.layout.extend(frame, row, column, grid, _real(named, seen, frame))


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
