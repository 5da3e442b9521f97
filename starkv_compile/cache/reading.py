"""Notices who reads the stored keys as if their number were a place, and who changes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer

from ..errors import CacheError
from .quantized import QuantizedTokens
from .state import SharedState

if TYPE_CHECKING:
    from .cache import StarKVCache

READS_KEYS = (
    "the model reads the keys or values of a layer before it has stored the new tokens there. "
    "Their length is the number of tokens stored, which is no position once the cache is shortened"
)
SHARED_LATER = (
    "the model reads the keys or values of a layer in a later graph of the call that stored them, "
    "as a layer does that shares the keys of another. They are compressed already, and a prompt "
    "needs all of them. Keep both layers in one graph of Dynamo (TORCH_LOGS=graph_breaks shows "
    "what breaks it), or pass what update() returned from one layer to the other"
)
WAY_OUT = "take positions from cache.get_seq_length(), and mask lengths from cache.get_mask_sizes()"


class WatchedLayer(DynamicLayer):
    """A layer that notices who reads its keys or values in a call, before it stores new tokens.

    Attributes:
        keys: [B, G, slots, D]; None before the first token.
        values: [B, G, slots, D]; None before the first token.
        seen: tokens of the stream.
        filled: how many slots hold a token; None: all.
        quantized: the oldest tokens, if they are stored in few bits.
        awaits: whether a call is in progress that has not stored its tokens in this layer yet.
        was_read: whether somebody has read keys or values meanwhile.
        handed: how many tokens the update of the call in progress returned, if it compresses.
    """

    shared: SharedState
    seen: int
    filled: int | None
    quantized: QuantizedTokens | None = None
    awaits = was_read = False
    handed: int | None = None
    _keys: Any = None
    _values: Any = None

    @property
    def stored(self) -> int:
        """Number of tokens stored."""
        return self.coded + self.in_full

    @property
    def coded(self) -> int:
        """Number of tokens stored in few bits, the oldest ones."""
        return 0 if self.quantized is None else self.quantized.tokens

    @property
    def in_full(self) -> int:
        """Number of tokens stored in the model's precision, the newest ones."""
        if not self.is_initialized or self._keys.dim() < 3:  # latents may have no heads
            return 0
        return self._keys.shape[-2] if self.filled is None else self.filled

    def with_quantized(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tokens stored in few bits, followed by these."""
        if self.quantized is None:
            return keys, values
        # torch 2.11 gives each length a symbol of its own, and attention to codes needs one.
        torch._check(keys.shape[-2] == values.shape[-2])
        older_keys, older_values = self.quantized.rows((keys.dtype, values.dtype))
        return torch.cat([older_keys, keys], -2), torch.cat([older_values, values], -2)

    @property
    def keys(self) -> Any:
        self._note_reading()
        return self._keys if self.quantized is None else self.in_model_precision()[0]

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._check_length(keys)
        self.drop_codes()
        self._keys = keys

    @property
    def values(self) -> Any:
        self._note_reading()
        return self._values if self.quantized is None else self.in_model_precision()[1]

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._check_length(values)
        self.drop_codes()
        self._values = values

    def in_model_precision(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens stored, as attention reads them."""
        return self.with_quantized(self._keys, self._values)

    def tokens_in_full(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tokens stored in the model's precision, with free slots."""
        return self._keys, self._values

    def drop_codes(self) -> None:
        """Before somebody else puts tokens in place: all others are stored in full, too."""
        if self.quantized is not None:
            keys, values = self.in_model_precision()
            if self.filled is not None:
                self.filled += self.coded
            self.quantized = None
            self._keys, self._values = keys, values

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

    def _check_length(self, given: Any) -> None:
        """Raises `CacheError` if somebody puts another number of tokens into the layer."""
        if given is None:
            return
        slots, new = (0 if t is None or t.dim() < 3 else t.shape[-2] for t in (self._keys, given))
        old = self.coded + slots
        if old and new != old:
            raise CacheError(
                f"keys or values of {new} tokens were put into a layer that stores {old}, and the "
                "cache would count on as before. Remove the last tokens with cache.crop(-n), and "
                "rows with cache.batch_select_indices"
            )

    def _note_reading(self) -> None:
        if self.awaits:
            self.was_read = True
        # In the graph of the update the tokens are not compressed before the graph has run.
        if self.handed is not None and self.stored != self.handed:
            raise CacheError(SHARED_LATER)

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
            layer.handed = None
