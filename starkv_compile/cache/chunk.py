"""Describes the tokens of a call to the cache, before the model stores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CacheError
from ..vision.describe import Seen, describe, tokens_of
from ..vision.layout import VisionLayout
from .open_frame import open_chunk
from .padding import check_padding, padding_of

if TYPE_CHECKING:
    from .cache import StarKVCache

DRAFTED_PROMPT = (
    "the prompt comes with drafted tokens (assisted or prompt-lookup decoding: "
    "logits_to_keep is more than 1), which may be rolled back; leave out "
    "assistant_model and prompt_lookup_num_tokens to compress it"
)
"""Why a first prompt with drafts stays uncompressed, and the way out."""


def begin_chunk(cache: StarKVCache, model: Any, named: Mapping[str, Any]) -> int:
    """Prepares `cache` for a call of `model` with several new tokens.

    Describes the tokens to the cache. If some of them are drafts, all are stored as they are,
    because drafts may be rolled back.

    Args:
        named: the model's arguments, with their names as keys.

    Returns:
        How many of the tokens are drafts.

    Raises:
        CacheError: drafts come with a prompt that the cache has seen, or the attention mask has
            padding that a compacted cache cannot hide.
    """
    drafts = drafted_tokens(named)
    if drafts:
        _check_drafts(cache, named)
    cache.shared.appending = drafts > 0
    mask = named.get("attention_mask")
    cache.shared.mask_fits = isinstance(mask, torch.Tensor) and mask.dim() == 4
    describe_chunk(cache, model, named)
    if drafts:  # some of the reply's tokens may come with them
        cache.begin_turn()
    return drafts


def drafted_tokens(named: Mapping[str, Any]) -> int:
    """How many tokens at the end are drafts: `generate` wants their logits to verify them."""
    wanted = named.get("logits_to_keep")
    return wanted - 1 if isinstance(wanted, int) and wanted > 1 else 0


def _check_drafts(cache: StarKVCache, named: Mapping[str, Any]) -> None:
    seen, positions = cache.get_seq_length(), named.get("position_ids")
    if seen and isinstance(positions, torch.Tensor) and int(positions.flatten()[0]) == 0:
        raise CacheError(
            f"assisted decoding passes the prompt again from its first token, but the cache has "
            f"seen {seen} tokens (generate does so with any cache that is not empty). Leave out "
            "assistant_model and prompt_lookup_num_tokens; to begin a new session, leave out the "
            "cache as well"
        )


def describe_chunk(cache: StarKVCache, model: Any, named: Mapping[str, Any]) -> None:
    """Appends the coming chunk to the layout of the cache, or notes that the layout is unknown.

    A frame that the last chunk cut goes on: both parts are described together, as one frame.

    Sources, best first: the images' grids or sizes, M-RoPE position ids, token ids alone (frames
    then count as squares). Without any of them, the graph pass looks for the layout.

    Args:
        named: the model's arguments, with their names as keys.

    Raises:
        CacheError: the attention mask has padding that a compacted cache cannot hide.
    """
    seen, shared, mask = cache.get_seq_length(), cache.shared, named.get("attention_mask")
    tokens = tokens_of(named)
    if shared.turn_ended:
        device = None if tokens is None else tokens.device
        shared.turn_start = torch.full((1,), seen, device=device)
        shared.turn_ended = False
    if not _is_square(named):
        check_padding(mask, seen)
        shared.padding = None if tokens is None else padding_of(mask, seen + tokens.shape[1])
    coming, last = Seen.of(getattr(model, "config", None), named), shared.chunk
    before = None if last is None or shared.layout is None else last.before(coming, seen)
    whole = coming if before is None else before.followed_by(coming)
    described, shared.chunk = describe(whole, named), None
    if described is None:
        shared.layout = None
        return
    frame, row, column, grid = described
    again = 0 if before is None else before.length
    if shared.layout is None:
        shared.layout = VisionLayout.empty(len(frame), frame.device)
        shared.layout.pad_text(seen)
        left = max((layer.retired for layer in cache.compressed_layers), default=0)
        shared.layout.counted[:, :left] = False  # it is unknown which tokens left
    shared.layout.truncate(seen)
    shared.layout.pad_text(seen)
    real = _real(named, seen - again, frame)
    shared.layout.extend(frame, row, column, grid, real, again)
    shared.chunk = open_chunk(whole, grid, shared.layout.seen)


def _is_square(named: Mapping[str, Any]) -> bool:
    """Whether the mask of one prompt is [S, S], which says more than what is padding."""
    mask, tokens = named.get("attention_mask"), tokens_of(named)
    if not isinstance(mask, torch.Tensor) or tokens is None:
        return False
    return len(tokens) == 1 and len(mask) > 1 and len(mask) == mask.shape[-1]


def _real(named: Mapping[str, Any], seen: int, frame: torch.Tensor) -> torch.Tensor | None:
    """[B, S] bool, False at the padding of a chunk after `seen` tokens; None without a 2D mask."""
    mask, (batch, new) = named.get("attention_mask"), frame.shape
    if not isinstance(mask, torch.Tensor) or mask.shape != (batch, seen + new):
        return None
    return mask[:, seen:].to(frame.device) != 0
