"""What a compressed cache cannot hide: padding between tokens, and masks that change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CacheError

if TYPE_CHECKING:
    from .cache import StarKVCache


def check_padding(mask: Any, seen: int) -> None:
    """Raises `CacheError` for padding in the mask [B, S] of a prompt after `seen` tokens."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or bool(mask.all()):
        return
    empty = (~mask.bool()).all(1)
    if bool(empty.any()):
        rows = empty.nonzero().flatten().tolist()
        raise CacheError(
            f"attention_mask hides all tokens of rows {rows}, but the last tokens of a row score "
            "its others. Leave such rows out. If prefill_chunk_size cuts the prompt, its first "
            "chunk is padding in these rows: give a larger one, or none"
        )
    if not bool(mask[:, -1].all()):
        raise CacheError(
            "attention_mask ends in zeros for some row: right-padded prompts cannot be compressed "
            "(the scoring window would be padding); tokenize with padding_side='left'"
        )
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise CacheError(
            "attention_mask has zeros after ones, but a compressed cache cannot hide padding "
            "between tokens; pad on the left, or leave those tokens out"
        )
    if seen and not bool(mask[:, seen:].all()):
        raise CacheError(
            "attention_mask pads the new tokens of a later turn, but a compressed cache cannot "
            "hide padding there. Give all rows new prompts of one length, or each row a cache of "
            "its own"
        )


def padding_of(mask: Any, tokens: int) -> torch.Tensor | None:
    """[B]: how many tokens a mask [B, tokens] hides in each row; None for any other mask."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or mask.shape[1] != tokens:
        return None
    return (mask == 0).sum(1)


def check_later_call(cache: StarKVCache, named: Mapping[str, Any], tokens: torch.Tensor) -> None:
    """Raises `CacheError` if a call counts tokens by what a short cache stores, or hides others.

    Reading a mask waits for the device once, and so does reading a position, as `generate` does
    after each token.

    Args:
        cache: a cache that has dropped tokens.
        named: the model's arguments, with their names as keys.
        tokens: [B, n] the call's new tokens, or [B, n, ...] their embeddings.
    """
    rows, new = tokens.shape[:2]
    layer = cache.short_layer
    assert layer is not None
    mask, positions = named.get("attention_mask"), named.get("position_ids")
    if isinstance(mask, torch.Tensor) and mask.shape == (rows, layer.stored + new):
        raise CacheError(
            f"attention_mask has {mask.shape[1]} columns, as many as the cache stores with the new "
            f"tokens. Give it one column for each token seen: {layer.seen + new}"
        )
    padding = _same_padding(cache.shared.padding, mask, layer.seen, rows, new)
    if not isinstance(positions, torch.Tensor) or positions.shape != (rows, new):
        return
    first = positions[:, 0]
    if bool((first == layer.stored).all() & (first != layer.seen - padding).any()):
        raise CacheError(
            f"position_ids begin at {layer.stored}, the number of tokens that the cache stores. "
            f"The next position is the number of tokens seen, {layer.seen}, less padding: take it "
            "from cache.get_seq_length(), or leave position_ids out"
        )


def _same_padding(known: torch.Tensor | None, mask: Any, seen: int, rows: int, new: int) -> Any:
    """[B] or 0: how many tokens are hidden. Raises `CacheError` if the prompt's mask hid others."""
    hidden = padding_of(mask, seen + new)
    before: Any = 0 if known is None or len(known) != rows else known
    if hidden is None:
        return before
    before = before if isinstance(before, int) else before.to(hidden.device)
    gaps = (mask[:, 1:] < mask[:, :-1]).any()
    if bool(gaps | (hidden != before).any()):
        check_padding(mask, seen)
        raise CacheError(
            f"attention_mask hides {hidden.tolist()} tokens at the left, but the mask of the last "
            "prompt did not hide as many, and a compressed cache cannot hide others later; keep "
            "that part of the mask as it was, or begin a new cache without those tokens"
        )
    return before
