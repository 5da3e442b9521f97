"""`StarKVCache`: a Hugging Face cache that can be compressed and still counts right.

Logical length is not physical length. `get_seq_length` is how many tokens have been seen, which
positions and input slicing go by; `get_mask_sizes` is what is stored, plus an offset, as the
library's own sliding-window layers do. A token once dropped stays dropped, so every operation
that would need it back is refused.

The cache holds all state of a session. A new cache is a new session.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..errors import CacheError
from ..kernels.marker import WriteArguments, Written
from ..kernels.ops import STARKV
from ..kernels.reference.star import Layout, State, fresh_state
from ..vision.layout import VisionLayout
from .size import stored_bytes

ONE_PROMPT = (
    "layers of this cache store different numbers of tokens (layer_budgets, or the policy's own), "
    "which the one mask of a model cannot fit: after its first prompt it takes tokens one at a "
    "time. Begin a new cache, or compile the model with a policy of one budget for every layer"
)
"""Why a cache takes no second prompt, and the way out."""

_LAYER_STATE = ("keys", "values", "seen", "retired", "kept", "novelty", "state")


class Session:
    """What all layers share.

    layout: of everything seen, or None where nobody knows it. appending: whether the coming tokens
    are stored as they are, because they may be rolled back (drafts to be verified). stepping:
    whether a token is being decoded into the layers' buffers; slot: [1] int64, its place in them.
    """

    def __init__(self) -> None:
        self.layout: VisionLayout | None = None
        self.appending = False
        self.stepping = False
        self.slot: torch.Tensor | None = None

    def fork(self) -> Session:
        twin = Session()
        twin.layout = None if self.layout is None else replace(self.layout)
        return twin


class StarKVLayer(DynamicLayer):
    """Keys and values of one layer, after compaction, and the layer's scoring state.

    keys, values: [B, G, stored, D]. kept: [B, C] int64, place in the session's stream of each
    token the last compaction kept, or [B, G, C] where each head keeps a set of its own; what came
    later follows it without gaps. novelty: float32 of the same shape, how new the policy found each
    of them in its own prompt; None, and what came later: 1. seen: tokens of the stream; retired:
    those of them that have left the session, with their frame or its turn, which no budget counts.

    While decoding in buffers, keys and values have room for tokens to come: filled is how many of
    their slots are taken, and dropped how many tokens of the stream are not stored. No graph reads
    filled or seen then, since they change with every token; it reads the session's slot, a tensor.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self._clear()

    def _clear(self) -> None:
        self.seen, self.retired = 0, 0
        self.kept: torch.Tensor | None = None
        self.novelty: torch.Tensor | None = None
        self.state: tuple[torch.Tensor, ...] | None = None
        self.filled: int | None = None
        self.dropped = 0

    @property
    def stored(self) -> int:
        if not self.is_initialized or self.keys.numel() == 0:
            return 0
        return self.keys.shape[-2] if self.filled is None else self.filled

    def make_room(self, tokens: int) -> bool:
        """See that the next token has a slot: a new buffer with `tokens` free ones if it has none.

        Returns:
            Whether keys and values have moved.
        """
        stored = self.stored
        if self.filled is not None and stored < self.keys.shape[-2]:
            return False
        self.keys = _with_room(self.keys, tokens)
        self.values = _with_room(self.values, tokens)
        self.filled, self.dropped = stored, self.seen - stored
        return True

    def settle(self) -> None:
        """Out of the buffers: keys and values hold what is stored and nothing else."""
        if self.filled is None:
            return
        self.keys = self.keys[:, :, : self.filled].clone()
        self.values = self.values[:, :, : self.filled].clone()
        self.filled = None

    def _write(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put one token into its slot; returns the buffers, whose free slots the mask hides."""
        slot = self.session.slot
        assert slot is not None
        slot = slot.to(self.keys.device)
        self.keys.index_copy_(2, slot, key_states)
        self.values.index_copy_(2, slot, value_states)
        return self.keys, self.values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return everything stored plus the new tokens, uncompressed.

        More than one new token is a prompt, unless the session is `appending`: what is stored of
        it goes through the marker op that the graph pass replaces.
        """
        if self.session.stepping:
            return self._write(key_states, value_states)
        self.settle()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stored, new = self.stored, key_states.shape[-2]
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        if new == 1 or self.session.appending:
            self.keys, self.values = keys, values
            self.seen = self.seen + new
            return keys, values
        index = self._places(stored, new, keys)
        self.seen = self.seen + new
        layout, counts, has_layout = self._layout(index, stored)
        state = self._state(keys, layout.current)
        arguments = WriteArguments(
            key=keys,
            value=values,
            place=index,
            novelty=self._novelties(index),
            **layout._asdict(),
            counts=counts,
            **state._asdict(),
            seen=self.seen - self.retired,
            has_layout=has_layout,
        )
        written = Written(*STARKV.cache_write(**arguments._asdict()))
        self.keys, self.values = written.key, written.value
        self.kept, self.novelty = written.place, written.novelty
        self.state = tuple(written.state)
        return keys, values

    def _places(self, stored: int, new: int, keys: torch.Tensor) -> torch.Tensor:
        """[B, (G,) stored + new]: place in the stream of each token about to be stored."""
        kept = self.kept
        first = self.seen - (stored - self._known)
        rest = torch.arange(first, self.seen + new, device=keys.device)
        if kept is None:
            return rest.expand(keys.shape[0], -1)
        return torch.cat([kept, rest.expand(*kept.shape[:-1], -1)], dim=-1)

    def _novelties(self, index: torch.Tensor) -> torch.Tensor:
        """Like `index`, the places of tokens about to be stored: how new each was, 1 if unknown."""
        known = index.new_ones(index.shape[:-1] + (0,)) if self.novelty is None else self.novelty
        return F.pad(known.float(), (0, index.shape[-1] - known.shape[-1]), value=1.0)

    @property
    def _known(self) -> int:
        """How many tokens the last compaction left."""
        return 0 if self.kept is None else self.kept.shape[-1]

    def _layout(self, index: torch.Tensor, stored: int) -> tuple[Layout, torch.Tensor, bool]:
        """The layout of what is stored, of each head where sets are; its counts; whether known."""
        layout = self.session.layout
        if layout is None or layout.seen != self.seen:  # the model stores tokens of its own as well
            text = torch.full_like(index, -1)
            current = text.flatten(1)[:, :1]
            return Layout(text, text, text, current), text.new_zeros(len(text), 2), False
        current = layout.current
        current = torch.where(current >= 0, current + stored, current)
        described = [layout.frame, layout.row, layout.column]
        if index.dim() == 3:
            described = [t[:, None].expand(-1, index.shape[1], -1) for t in described]
        frame, row, column = (t.gather(-1, index) for t in described)
        return Layout(frame, row, column, current), layout.counts, True

    def _state(self, keys: torch.Tensor, current: torch.Tensor) -> State:
        """The state so far, its pattern as wide as the current frame."""
        if self.state is None:
            return fresh_state(keys, current)
        state = State(*self.state)
        room = current.shape[1] - state.pattern.shape[-1]
        return state._replace(pattern=F.pad(state.pattern, (0, room)))

    def get_seq_length(self) -> int:
        """Tokens seen; a tensor in a graph that decodes into buffers, as of a static cache."""
        slot = self.session.slot
        if self.session.stepping and slot is not None and torch.compiler.is_compiling():
            return slot[0] + self.dropped  # type: ignore[return-value]
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens stored plus new ones, tokens dropped).

        The offset lines the mask up with the last `stored` columns: dropped padding was on the
        left, so what is left of a row's padding is what falls into those columns. Free slots of a
        buffer are columns of tokens to come, which causality hides.
        """
        if self.session.stepping:
            return self.keys.shape[-2], self.dropped
        self.settle()
        return self.stored + query_length, self.seen - self.stored

    def reset(self) -> None:
        super().reset()
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (a negative number). Only tokens since the last compaction."""
        if tokens_to_remove > 0:
            raise CacheError(
                f"crop({tokens_to_remove}): pass the number of tokens to remove as a negative "
                "number"
            )
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        remove, known = -tokens_to_remove, self._known
        if remove > self.stored - known and self.seen != self.stored:
            raise CacheError(
                f"crop({tokens_to_remove}): only {self.stored - known} tokens came after the last "
                "compaction; older ones were compressed and cannot be rolled back. Copy the cache "
                "before the prompt you may want to undo, or start a new one"
            )
        self.settle()
        super().crop(tokens_to_remove)
        self.seen -= remove
        if self.kept is not None:
            self.kept = self.kept[..., : self.stored]
        if self.novelty is not None:
            self.novelty = self.novelty[..., : self.stored]

    def places(self) -> torch.Tensor:
        """[B, (G,) stored]: place in the stream of each token stored."""
        return self._places(self.stored, 0, self.keys)

    def novelties(self) -> torch.Tensor:
        """[B, (G,) stored] float32: how new each token stored was in its own prompt."""
        return self._novelties(self.places())

    @property
    def full_nbytes(self) -> int:
        """Bytes of this layer had every token seen been stored."""
        return self.seen * (self.keys.nbytes + self.values.nbytes) // self.stored

    def keep_only(self, stay: torch.Tensor) -> None:
        """Store the tokens of slots `stay` alone, of every batch row: [n], or [G, n] by head."""
        places = self.places()
        slots = stay.expand(*places.shape[:-1], -1)
        novelty = self._novelties(places)
        self.kept, self.novelty = places.gather(-1, slots), novelty.gather(-1, slots)
        rows = stay.expand(*self.keys.shape[:2], -1)[..., None]
        self.keys = self.keys.gather(2, rows.expand(-1, -1, -1, self.keys.shape[-1]))
        self.values = self.values.gather(2, rows.expand(-1, -1, -1, self.values.shape[-1]))
        self.filled = None

    def fork(self, session: Session) -> StarKVLayer:
        """A layer of another session with the same contents; storage is shared till it grows."""
        self.settle()
        twin = StarKVLayer(session)
        twin.__dict__.update({**vars(self), "session": session})
        return twin

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep, repeat or reorder batch rows of everything the layer holds."""
        if not self.is_initialized:
            return
        keys, values = self.keys[rows], self.values[rows]
        if self.filled is not None and keys.shape == self.keys.shape:  # their addresses stay
            self.keys.copy_(keys)
            self.values.copy_(values)
        else:
            self.keys, self.values = keys, values
        if self.kept is not None:
            self.kept = self.kept[rows]
        if self.novelty is not None:
            self.novelty = self.novelty[rows]
        if self.state is not None:
            self.state = tuple(t[rows] for t in self.state)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.select_rows(beam_idx.to(self.keys.device) if self.is_initialized else beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.select_rows(rows.repeat_interleave(repeats))


class StarKVCache(DynamicCache):
    """A `DynamicCache` whose full-attention layers are `StarKVLayer`s.

    `StarKVCache(model.config)` makes an empty one: pass it as the model's cache (`cache`,
    before transformers 5.24 `past_key_values`) to keep one session over several calls.
    Sliding-window layers stay the library's own.
    """

    session: Session

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
        return stored_bytes(self)

    @property
    def is_compileable(self) -> bool:
        """Whether a token is being decoded into buffers: then no mask may be left out."""
        return self.session.stepping

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
        if self.session.slot is None:
            with torch.inference_mode(False):
                slot = torch.zeros(1, dtype=torch.int64, device=layers[0].device)
            self.session.slot = _fixed(slot)
        self.session.slot.fill_(stored.pop())
        self.session.stepping = True
        return any(moved)

    def end_step(self, written: bool) -> None:
        """After the call that `begin_step` was for. written: whether it stored its token."""
        self.session.stepping = False
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
        layout = self.session.layout
        if layout is None or self.get_seq_length() == 0:
            return
        if len(layout.frame) != 1:
            raise CacheError(
                f"keep_newest_frames: the cache has {len(layout.frame)} rows, whose frames may "
                "differ in size; give each session a cache of its own"
            )
        layout.truncate(self.get_seq_length())  # of a prompt that failed
        layout.pad_text(self.get_seq_length())  # the reply
        frame, counted = layout.frame[0], layout.counted[0]
        visual = frame >= 0
        dropped = visual & (frame < int(frame.max()) + 1 - frames)
        dropped[:text_from] |= ~visual[:text_from]
        dropped = (dropped | ~counted) & visual.cumsum(0).bool()
        layers = [layer for layer in self.compressed_layers if layer.stored]
        leaving = int((dropped & counted).sum())
        if not leaving or not layers:
            return
        layout.counted = layout.counted & ~dropped
        places = [layer.places()[0] for layer in layers]
        left = max(
            min(int((~dropped[stored]).sum(-1).min()) for stored in places),
            max(int((~dropped & ~visual)[stored].sum(-1).max()) for stored in places),
        )
        for layer, stored in zip(layers, places, strict=True):
            order = _oldest_visual_first(frame[stored], dropped[stored])
            layer.keep_only(order[..., layer.stored - left :].sort(-1).values)
            layer.retired += leaving

    def fork(self) -> StarKVCache:
        """A second session that goes on from here; neither notices what the other one adds.

        Raises:
            CacheError: a layer is of another kind, whose contents cannot be shared.
        """
        self._check_only_ours("fork")
        twin = object.__new__(StarKVCache)
        twin.__dict__.update(vars(self))
        twin.session = self.session.fork()
        twin.layers = [layer.fork(twin.session) for layer in self.compressed_layers]
        twin.layer_class_to_replicate = functools.partial(StarKVLayer, twin.session)
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
        layout = self.session.layout
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
        self.session.layout = None if layout is None else VisionLayout(**layout)
        self.layers = [StarKVLayer(self.session) for _ in state["layers"]]
        for layer, values in zip(self.compressed_layers, state["layers"], strict=True):
            if values["keys"] is not None:
                layer.lazy_initialization(values["keys"], values["values"])
                layer.__dict__.update(values)

    def reset(self) -> None:
        """Forget everything: a new session on the same object."""
        super().reset()
        self.session.layout, self.session.appending, self.session.stepping = None, False, False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens from every layer, or raise `CacheError` and change nothing."""
        before = [(vars(layer).copy(), layer) for layer in self.layers]
        try:
            super().crop(tokens_to_remove)
        except Exception:
            for saved, layer in before:
                layer.__dict__.update(saved)
            raise
        if self.session.layout is not None:
            self.session.layout.truncate(self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select_layout(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select_layout(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        layout = self.session.layout
        if layout is not None:
            rows = torch.arange(len(layout.frame), device=layout.frame.device)
            layout.select(rows.repeat_interleave(repeats))

    def _select_layout(self, rows: torch.Tensor) -> None:
        layout = self.session.layout
        if layout is not None:
            layout.select(rows.to(layout.frame.device))


@torch.inference_mode(False)
def _with_room(tokens: torch.Tensor, room: int) -> torch.Tensor:
    """A copy of [B, G, stored, D] with `room` more slots, zero: a mask hides finite values only.

    Not of inference mode, outside which nothing may write to what was made inside.
    """
    batch, groups, stored, dim = tokens.shape
    buffer = tokens.new_zeros(batch, groups, stored + room, dim)
    buffer[:, :, :stored] = tokens
    return _fixed(buffer)


def _fixed(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, told to the compiler as one whose address stays: CUDA graphs may write to it."""
    torch._dynamo.mark_static_address(tensor, guard=False)
    return tensor


def _oldest_visual_first(frame: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """Slots in the order they are dropped: those `gone`, then by frame, text last."""
    last = frame.max() + 1
    rank = torch.where(gone, -1, torch.where(frame < 0, last, frame))
    return rank.argsort(dim=-1, stable=True)


def adopt(cache: DynamicCache) -> StarKVCache:
    """Turn an empty stock cache into a `StarKVCache`, in place: `generate` keeps its object."""
    session = Session()
    if cache.layers:
        cache.layers = [
            StarKVLayer(session) if type(layer) is DynamicLayer else layer for layer in cache.layers
        ]
    else:
        cache.layer_class_to_replicate = functools.partial(StarKVLayer, session)
    cache.__class__ = StarKVCache
    cache.session = session
    return cache
