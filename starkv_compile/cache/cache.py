"""`StarKVCache`: a Hugging Face cache that can be compressed and still counts right.

Logical length is not physical length. `get_seq_length` is how many tokens have been seen, which
positions and input slicing go by; `get_mask_sizes` is what is stored, plus an offset, as the
library's own sliding-window layers do. A token once dropped stays dropped, so every operation
that would need it back is refused.

The cache holds all state of a session. A new cache is a new session.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..errors import CacheError
from ..vision.layout import VisionLayout
from .frames import keep_newest_frames
from .layer import ONE_PROMPT, StarKVLayer, fixed_address
from .size import cache_bytes, full_bytes
from .state import SharedState

_LAYER_STATE = ("keys", "values", "seen", "retired", "kept", "novelty", "state")


class StarKVCache(DynamicCache):
    """A `DynamicCache` whose full-attention layers are `StarKVLayer`s.

    `StarKVCache(model.config)` makes an empty one: pass it as the model's cache (`cache`,
    before transformers 5.24 `past_key_values`) to keep one session over several calls.
    Sliding-window layers stay the library's own.
    """

    shared: SharedState

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config.get_text_config(decoder=True))
        adopt(self)

    @property
    def compressed_layers(self) -> list[StarKVLayer]:
        return [layer for layer in self.layers if isinstance(layer, StarKVLayer)]

    @property
    def is_uneven(self) -> bool:
        """Whether layers store different numbers of tokens, so that no mask fits all of them."""
        return len({layer.stored for layer in self.compressed_layers if layer.stored}) > 1

    @property
    def nbytes(self) -> int:
        """Bytes of the storages that hold keys and values, all layers."""
        return cache_bytes(self)

    @property
    def full_nbytes(self) -> int:
        """Bytes of the compressed layers, had every token that they have seen been stored."""
        return full_bytes(self.compressed_layers)

    @property
    def is_compileable(self) -> bool:
        """Whether a token is being decoded into buffers: then no mask may be left out."""
        return self.shared.stepping

    def begin_step(self, tokens: int) -> bool:
        """The next token goes into buffers, made with `tokens` free slots where there are none.

        Until `end_step` the cache is as static as the library's own static one, for one token: no
        length in it is a Python number that changes. Whoever calls the model does this, as it
        cannot be done inside a graph.

        Returns:
            Whether buffers were made; they are full-size copies at new addresses.

        Raises:
            CacheError: layers hold different numbers of tokens; nothing is changed.
        """
        layers = [layer for layer in self.compressed_layers if layer.stored]
        stored = {layer.stored for layer in layers}
        if len(stored) != 1:
            raise CacheError(
                f"the layers store {sorted(stored)} tokens, but the next one has one slot in all"
            )
        moved = [layer.make_room(tokens) for layer in layers]
        if self.shared.slot is None:
            with torch.inference_mode(False):
                slot = torch.zeros(1, dtype=torch.int64, device=layers[0].device)
            self.shared.slot = fixed_address(slot)
        self.shared.slot.fill_(stored.pop())
        self.shared.stepping = True
        return any(moved)

    def end_step(self, written: bool) -> None:
        """After the call that `begin_step` was for. written: whether it stored its token."""
        self.shared.stepping = False
        for layer in self.compressed_layers:
            if written and layer.filled is not None:
                layer.filled += 1
                layer.seen += 1

    def keep_newest_frames(self, frames: int, text_from: int = 0) -> None:
        """Drop all but the newest `frames` frames, and text before place `text_from` of the stream.

        Text before the first frame stays (a system prompt, a task). From then on a budget that is a
        share counts what stays.

        A model has one mask for all layers, so all are left with the same number of tokens: a layer
        that would have more drops its oldest visual tokens as well; one that has less text than
        another keeps as many of the newest tokens that were to go. So does each head that keeps a
        set of its own.

        Raises:
            CacheError: several batch rows, whose frames may differ in size, or layers that store
                different numbers of tokens; nothing is changed.
        """
        if self.is_uneven:
            raise CacheError(f"keep_newest_frames: {ONE_PROMPT}")
        layers = [layer for layer in self.compressed_layers if layer.stored]
        keep_newest_frames(layers, self.shared, frames, text_from)

    def fork(self) -> StarKVCache:
        """A second session that goes on from here; neither notices what the other one adds.

        Raises:
            CacheError: a layer is of another kind, whose contents cannot be shared.
        """
        self._check_only_ours("fork")
        twin = object.__new__(StarKVCache)
        twin.__dict__.update(vars(self))
        twin.shared = self.shared.fork()
        twin.layers = [layer.fork(twin.shared) for layer in self.compressed_layers]
        twin.layer_class_to_replicate = functools.partial(StarKVLayer, twin.shared)
        return twin

    def _check_only_ours(self, what: str) -> None:
        others = {type(layer).__name__ for layer in self.layers} - {StarKVLayer.__name__}
        if others:
            raise CacheError(
                f"{what}: this model also caches in {', '.join(sorted(others))}, which starkv does "
                "not look into; keep such a session in one piece"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything the cache holds, in tensors, numbers and lists only.

        Raises:
            CacheError: a layer is of another kind.
        """
        self._check_only_ours("state_dict")
        for layer in self.compressed_layers:
            layer.settle()
        layers = [
            {name: getattr(layer, name, None) for name in _LAYER_STATE}
            for layer in self.compressed_layers
        ]
        layout = self.shared.layout
        return {"layers": layers, "layout": None if layout is None else dict(vars(layout))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; the cache must be empty.

        Raises:
            CacheError: the cache is in use.
        """
        if self.get_seq_length():
            raise CacheError(
                f"load_state_dict: the cache has seen {self.get_seq_length()} tokens; load into a "
                "new StarKVCache(model.config)"
            )
        layout = state["layout"]
        self.shared.layout = None if layout is None else VisionLayout(**layout)
        self.layers = [StarKVLayer(self.shared) for _ in state["layers"]]
        for layer, values in zip(self.compressed_layers, state["layers"], strict=True):
            if values["keys"] is not None:
                layer.lazy_initialization(values["keys"], values["values"])
                layer.__dict__.update(values)

    def reset(self) -> None:
        """Forget everything: a new session on the same object."""
        super().reset()
        self.shared.layout, self.shared.appending, self.shared.stepping = None, False, False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens from every layer, or raise `CacheError` and change nothing."""
        before = [(vars(layer).copy(), layer) for layer in self.layers]
        try:
            super().crop(tokens_to_remove)
        except Exception:
            for saved, layer in before:
                layer.__dict__.update(saved)
            raise
        if self.shared.layout is not None:
            self.shared.layout.truncate(self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_layout(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_layout(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        layout = self.shared.layout
        if layout is not None:
            rows = torch.arange(len(layout.frame), device=layout.frame.device)
            layout.select(rows.repeat_interleave(repeats))

    def _select_layout(self, rows: torch.Tensor) -> None:
        layout = self.shared.layout
        if layout is not None:
            layout.select(rows.to(layout.frame.device))


def ready_cache(config: PreTrainedConfig, given: Any) -> StarKVCache | None:
    """What a caller gave as cache, as one that can be compressed; None where it cannot become one.

    Args:
        config: of the model.
        given: a cache, or None: then the cache is new.
    """
    if given is None:
        return StarKVCache(config)
    if is_stock(given) and given.get_seq_length() == 0:
        return adopt(given)
    return given if isinstance(given, StarKVCache) else None


def is_stock(cache: Any) -> bool:
    """Whether it is the library's default cache, which `adopt` takes while it is empty."""
    return type(cache) is DynamicCache and not getattr(cache, "offloading", False)


def adopt(cache: DynamicCache) -> StarKVCache:
    """Turn an empty stock cache into a `StarKVCache`, in place: `generate` keeps its object."""
    shared = SharedState()
    if cache.layers:
        cache.layers = [
            StarKVLayer(shared) if type(layer) is DynamicLayer else layer for layer in cache.layers
        ]
    else:
        cache.layer_class_to_replicate = functools.partial(StarKVLayer, shared)
    cache.__class__ = StarKVCache
    cache.shared = shared
    return cache
