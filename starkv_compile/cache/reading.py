"""Notices who reads the stored keys as if their number were a place, and who changes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer

from ..errors import CacheError
from .state import SharedState

if TYPE_CHECKING:
    from .cache import StarKVCache

READS_KEYS = (
    "the model reads the keys or values of a layer before it has stored the new tokens there. "
    "Their length is the number of tokens stored, which is no position once the cache is shortened"
)
WAY_OUT = "take positions from cache.get_seq_length(), and mask lengths from cache.get_mask_sizes()"


class WatchedLayer(DynamicLayer):
    """A layer that notices who reads its keys or values in a call, before it stores new tokens.

    Attributes:
        keys: [B, G, slots, D]; None before the first token.
        values: [B, G, slots, D]; None before the first token.
        seen: tokens of the stream.
        filled: how many slots hold a token; None: all.
        awaits: whether a call is in progress that has not stored its tokens in this layer yet.
        was_read: whether somebody has read keys or values meanwhile.
    """

    shared: SharedState
    seen: int
    filled: int | None
    awaits = was_read = False
    _keys: Any = None
    _values: Any = None

    @property
    def stored(self) -> int:
        """Number of tokens stored."""
        if not self.is_initialized or self._keys.numel() == 0:
            return 0
        return self._keys.shape[-2] if self.filled is None else self.filled

    @property
    def keys(self) -> Any:
        self._note_reading()
        return self._keys

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        _check_length(self._keys, keys)
        self._keys = keys

    @property
    def values(self) -> Any:
        self._note_reading()
        return self._values

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        _check_length(self._values, values)
        self._values = values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As in transformers, but without a property's setter, which Dynamo of torch 2.11 skips."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.hold(
            torch.tensor([], dtype=key_states.dtype, device=self.device),
            torch.tensor([], dtype=value_states.dtype, device=self.device),
        )
        self.is_initialized = True

    def hold(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Puts keys and values of any length in place. The caller says which tokens they are."""
        self._keys, self._values = keys, values

    def _note_reading(self) -> None:
        if self.awaits:
            self.was_read = True

    def _check_reading(self) -> None:
        """Before an update: makes the cache keep every token if somebody has read this layer.

        A layer that is read and not updated in a call is cross-attention's: that is no harm.

        Raises:
            CacheError: the cache is shortened already, or another layer has stored tokens that will
                be.
        """
        self.awaits, was_read, self.was_read = False, self.was_read, False
        if not was_read or self.shared.is_read:
            return
        if self.shared.compacts or self.stored != self.seen:
            raise CacheError(f"{READS_KEYS}. To compress this model, {WAY_OUT}")
        self.shared.is_read = True


def _check_length(before: Any, after: Any) -> None:
    """Raises `CacheError` if somebody puts another number of tokens into a layer."""
    old, new = (0 if t is None or t.dim() < 4 else t.shape[-2] for t in (before, after))
    if old and after is not None and new != old:
        raise CacheError(
            f"keys or values of {new} tokens were put into a layer that stores {old}, and the "
            "cache would count on as before. Remove the last tokens with cache.crop(-n), and rows "
            "with cache.batch_select_indices"
        )


@contextlib.contextmanager
def watched(cache: StarKVCache) -> Iterator[None]:
    """Surrounds one call of a model with `cache`, in which its layers notice who reads them."""
    cache.shared.compacts = False
    for layer in cache.compressed_layers:
        layer.awaits = True
    try:
        yield
    finally:
        for layer in cache.compressed_layers:
            layer.awaits = layer.was_read = False
