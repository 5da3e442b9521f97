"""`StarKVCache`: a Hugging Face cache that counts tokens seen apart from tokens stored.

`get_seq_length` returns the tokens seen, which positions and the slicing of inputs need.
`get_mask_sizes` returns the tokens stored and an offset, as sliding-window layers of transformers
do. A dropped token cannot return, so the cache refuses every operation that would need one.

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
from .checks import LAYOUT_STATE, check_state
from .frames import keep_newest_frames
from .layer import ONE_PROMPT, StarKVLayer, fixed_address
from .size import cache_bytes, full_bytes
from .state import SharedState


class StarKVCache(DynamicCache):
    """A `DynamicCache` whose full-attention layers can be compressed.

    `StarKVCache(model.config)` makes an empty cache. Pass it to the model (argument `cache`, or
    `past_key_values` before transformers 5.24) to keep one session over several calls.
    Sliding-window layers stay those of transformers.

    Args:
        config: configuration of the model.
    """

    shared: SharedState

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config.get_text_config(decoder=True))
        adopt(self)

    @property
    def compressed_layers(self) -> list[StarKVLayer]:
        """The layers that can be compressed, first to last."""
        return [layer for layer in self.layers if isinstance(layer, StarKVLayer)]

    @property
    def is_uneven(self) -> bool:
        """Whether layers that have seen the same tokens store different numbers of them.

        Then no single mask fits them all.
        """
        lengths = self._lengths()
        return len(lengths) > len({seen for seen, _ in lengths})

    @property
    def short_layer(self) -> StarKVLayer | None:
        """The first layer that has dropped tokens; None while every token is stored."""
        return next((x for x in self.compressed_layers if x.stored < x.seen), None)

    def _lengths(self) -> set[tuple[int, int]]:
        """(tokens seen, tokens stored) of the layers. Cross-attention sees other tokens."""
        return {(layer.seen, layer.stored) for layer in self.compressed_layers if layer.stored}

    @property
    def nbytes(self) -> int:
        """Bytes of the storages that hold keys and values, all layers."""
        return cache_bytes(self)

    @property
    def full_nbytes(self) -> int:
        """Bytes that the compressed layers would take if they stored every token seen."""
        return full_bytes(self.compressed_layers)

    @property
    def is_compileable(self) -> bool:
        """Whether a token is being decoded into buffers. Then transformers always makes a mask."""
        return self.shared.stepping

    def check_whole(self) -> None:
        """Raises `CacheError` if a call stopped between layers, and some lack its tokens."""
        seen = self.shared.stopped_at
        if seen is not None:
            layers = ", ".join(f"layer {number}: {tokens}" for number, tokens in seen.items())
            raise CacheError(
                "an earlier call stopped between layers, so they have seen different numbers of "
                f"tokens ({layers}), and later tokens would be wrong. Begin a new cache with "
                "StarKVCache(model.config) and pass the whole prompt again, or continue a fork "
                "made before that call"
            )

    def begin_step(self, tokens: int) -> bool:
        """Prepares buffers for the next token.

        Until `end_step` the cache is static for one token, as a `StaticCache` is: no length in it
        is a Python number that changes. Call this outside the graph, before the model.

        Args:
            tokens: free slots of new buffers. They are made if no slot is free.

        Returns:
            Whether new buffers were made. They are full copies at new addresses.

        Raises:
            CacheError: layers store different numbers of tokens. The cache stays as it is.
        """
        layers = [layer for layer in self.compressed_layers if layer.stored]
        stored = {layer.stored for layer in layers}
        next_slots = {layer.in_full for layer in layers}
        if len(stored) != 1 or len(next_slots) != 1:
            raise CacheError(
                f"the layers store {sorted(stored)} tokens, but buffers need the same next slot in "
                "all layers"
            )
        moved = [layer.make_room(tokens) for layer in layers]
        if self.shared.slot is None:
            with torch.inference_mode(False):
                slot = torch.zeros(1, dtype=torch.int64, device=layers[0].device)
            self.shared.slot = fixed_address(slot)
        self.shared.slot.fill_(next_slots.pop())
        self.shared.stepping = True
        return any(moved)

    def end_step(self, written: bool) -> None:
        """Ends the step that `begin_step` began. written: whether the call stored its token."""
        self.shared.stepping = False
        for layer in self.compressed_layers:
            if written and layer.filled is not None:
                layer.filled += 1
                layer.seen += 1

    def keep_newest_frames(self, frames: int, text_from: int = 0) -> None:
        """Drops all frames but the newest, and on request the text of their turns.

        Text before the first frame stays (a system prompt, a task). From then on, a budget that is
        a share counts only what stays.

        A model has one mask for all layers, so every layer ends with the same number of tokens. A
        layer that would have more also drops its oldest visual tokens. A layer that would have
        fewer keeps as many of the newest tokens that were to go. The same holds for heads that keep
        sets of their own.

        Args:
            frames: how many of the newest frames stay.
            text_from: place in the stream of all tokens seen. Text before it leaves. 0: all text
                stays.

        Raises:
            CacheError: the cache has several batch rows, whose frames may differ in size, or its
                layers store different numbers of tokens. The cache stays as it is.
        """
        self.check_whole()
        if len(self._lengths()) > 1:
            raise CacheError(f"keep_newest_frames: {ONE_PROMPT}")
        layers = [layer for layer in self.compressed_layers if layer.stored]
        keep_newest_frames(layers, self.shared, frames, text_from)

    def quantize(self, nbits: int, in_full: int) -> None:
        """Stores the tokens of all compressed layers in codes, but the newest `in_full`.

        A token that has codes keeps them. The attention of a decoded token reads codes. The graph
        of a later prompt turns them into keys and values again, one layer at a time.

        Args:
            nbits: 8 or 4 bits for each number, and 32 for each token and head. 16: all tokens stay
                in the model's precision.
            in_full: how many of the newest tokens stay in the model's precision.
        """
        for layer in self.compressed_layers:
            layer.quantize(nbits, in_full)

    def check_bits(self, nbits: int) -> None:
        """Raises `CacheError` if tokens have codes of another number of bits; 16 fits all."""
        held = {x.nbits for x in self.compressed_layers if x.quantized is not None} - {nbits}
        if nbits != 16 and held:
            raise CacheError(
                f"this cache holds tokens in {min(held)} bits, and the model was compiled with "
                f"nbits={nbits}; compile it with nbits={min(held)}, or begin a new cache"
            )

    def fork(self) -> StarKVCache:
        """Returns a second cache that continues from here. Neither one changes the other.

        Raises:
            CacheError: a layer is of another kind, which cannot be copied, or a call stopped
                between layers.
        """
        self.check_whole()
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
                f"{what}: this model also caches in {', '.join(sorted(others))}, which starkv "
                "cannot copy; continue the session on this one cache"
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that the cache holds, in tensors, numbers, lists and mappings.

        Raises:
            CacheError: a layer is of another kind, which cannot be copied, or a call stopped
                between layers.
        """
        self.check_whole()
        self._check_only_ours("state_dict")
        layers = [layer.state_dict() for layer in self.compressed_layers]
        layout = self.shared.layout
        described = layout and {name: getattr(layout, name) for name in LAYOUT_STATE}
        return {"layers": layers, "layout": described, "padding": self.shared.padding}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` returned into an empty cache.

        Everything is checked first, so a state from a file that somebody changed does no harm.

        Raises:
            CacheError: the cache holds tokens already, or `state` is not one of a cache with these
                layers. The cache stays as it is.
        """
        if self.get_seq_length():
            raise CacheError(
                f"load_state_dict: the cache has seen {self.get_seq_length()} tokens; load into a "
                "new StarKVCache(model.config)"
            )
        self._check_only_ours("load_state_dict")
        check_state(state, len(self.compressed_layers))
        layout = state["layout"]
        self.shared.layout = None if layout is None else VisionLayout(**layout)
        self.shared.padding = state["padding"]
        self.begin_turn()
        self.layers = [StarKVLayer(self.shared) for _ in state["layers"]]
        for layer, stored in zip(self.compressed_layers, state["layers"], strict=True):
            layer.load_state_dict(stored)

    def reset(self) -> None:
        """Forgets everything. The cache then holds a new session."""
        super().reset()
        self.begin_turn()
        self.shared.layout = self.shared.stopped_at = self.shared.padding = None
        self.shared.appending = self.shared.stepping = False
        self.shared.is_read = self.shared.uneven = False

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens from every layer.

        Args:
            tokens_to_remove: their number, negative: -3 removes 3 tokens.

        Raises:
            CacheError: the number is positive, or larger than the number of tokens after the last
                compaction, or a call stopped between layers. The cache stays as it is.
        """
        self.check_whole()
        before = [(vars(layer).copy(), layer) for layer in self.layers]
        try:
            super().crop(tokens_to_remove)
        except Exception:
            for saved, layer in before:
                layer.__dict__.update(saved)
            raise
        self.begin_turn()
        if self.shared.layout is not None:
            self.shared.layout.truncate(self.get_seq_length())
        if self.shared.padding is not None:
            self.shared.padding = self.shared.padding.clamp(max=self.get_seq_length())

    def begin_turn(self) -> None:
        """Says that the next prompt is a new turn.

        A prompt that follows another one is taken for the next chunk of the same prompt, unless a
        token was decoded, drafted or removed between them. So call it after a reply of one token,
        which `generate` does not store. `AgentSession` calls it at every step.
        """
        self.shared.turn_ended, self.shared.chunk = True, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.shared.select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.shared.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        layers = [layer for layer in self.compressed_layers if layer.stored]
        rows = len(layers[0].tokens_in_full()[0]) if layers else 0
        self.shared.select_rows(torch.arange(rows // repeats).repeat_interleave(repeats))


def ready_cache(config: PreTrainedConfig, given: Any) -> StarKVCache | None:
    """Returns the cache of a call in a form that can be compressed; None if it has none.

    Args:
        config: configuration of the model.
        given: the caller's cache. None: a new one is made.
    """
    if given is None:
        return StarKVCache(config)
    if is_stock(given) and given.get_seq_length() == 0:
        if not given.layers:  # made without the configuration, so it knows no sliding windows
            given.layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
        return adopt(given)
    return given if isinstance(given, StarKVCache) else None


def is_stock(cache: Any) -> bool:
    """Whether it is the default cache of transformers, which `adopt` accepts while it is empty."""
    return type(cache) is DynamicCache and not getattr(cache, "offloading", False)


def adopt(cache: DynamicCache) -> StarKVCache:
    """Turns an empty default cache into a `StarKVCache` in place: `generate` keeps its object."""
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
