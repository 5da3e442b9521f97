"""One layer of the cache: the tokens it stores, the tokens it has seen, and its scoring state."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ..errors import CacheError
from ..kernels.marker import WriteArguments, Written
from ..kernels.ops import STARKV
from ..kernels.reference.quantization import Quantized
from ..kernels.reference.star import Layout, State, fresh_state
from ..vision.layout import stored_slots
from .checks import LAYER_FACTS
from .quantized import QuantizedTokens, quantize_tokens
from .reading import WatchedLayer
from .state import SharedState

ONE_PROMPT = (
    "layers of this cache store different numbers of tokens (by layer_budgets, the policy, or "
    "because one of them could not be compressed), but a model has one mask for all layers: after "
    "its first prompt the cache takes one token at a time, without padding. Begin a new cache, or "
    "compile the model with a policy of one budget for every layer"
)
"""Why a cache takes no second prompt, and the way out."""


class StarKVLayer(WatchedLayer):
    """Keys and values of one layer after compaction, and the layer's scoring state.

    During decoding in buffers, keys and values have room for later tokens. A graph then reads the
    shared slot, a tensor: `filled` and `seen` are numbers that change with every token.

    Attributes:
        keys: [B, G, stored, D], also of tokens that are stored in few bits.
        values: [B, G, stored, D], as well.
        stored: number of tokens stored.
        kept: [B, C] int64, place in the session's stream of each token that the last compaction
            kept; [B, G, C] if each head keeps a set of its own. Later tokens follow without gaps.
        novelty: float32 of the shape of `kept`: how new the policy found each of these tokens in
            its own prompt. None: 1 for all. Later tokens count 1.
        state: tensors of `reference.star.State`, or None before the first compaction.
        seen: tokens of the stream.
        retired: how many of these have left the session, with their frame or its turn. No budget
            counts them.
        filled: how many slots of the buffers hold a token; None without buffers.
        dropped: how many tokens of the stream are not in the buffers: they are gone, or quantized.
        quantized: the oldest tokens, in codes of `nbits`. Keys and values of the graph hold only
            those that follow.
        earlier: tokens that had codes before the prompt that is being compacted. Those that stay
            get their codes back.
        addresses: of the buffers that `make_room` made. Keys and values at other addresses were
            widened or selected since.
    """

    def __init__(self, shared: SharedState) -> None:
        super().__init__()
        self.shared = shared
        self._clear()

    def _clear(self) -> None:
        self.seen, self.retired = 0, 0
        self.kept: torch.Tensor | None = None
        self.novelty: torch.Tensor | None = None
        self.state: tuple[torch.Tensor, ...] | None = None
        self.filled = None
        self.dropped = 0
        self.addresses: tuple[int, int] | None = None
        self.quantized: QuantizedTokens | None = None
        self.earlier: QuantizedTokens | None = None
        self.nbits = 16

    def make_room(self, tokens: int) -> bool:
        """Makes new buffers with `tokens` free slots if there is no slot for the next token.

        Returns:
            Whether keys and values have moved.
        """
        held = self.in_full
        has_room = self.filled is not None and held < self._keys.shape[-2]
        if has_room and self._addresses() == self.addresses:
            return False
        self._keys = _with_room(self._keys[:, :, :held], tokens)
        self._values = _with_room(self._values[:, :, :held], tokens)
        self.filled, self.dropped = held, self.seen - held
        self.addresses = self._addresses()
        return True

    def _addresses(self) -> tuple[int, int]:
        return self._keys.data_ptr(), self._values.data_ptr()

    def settle(self) -> None:
        """Leaves the buffers: keys and values then hold the stored tokens only."""
        if self.filled is None:
            return
        self._keys = self._keys[:, :, : self.filled].clone()
        self._values = self._values[:, :, : self.filled].clone()
        self.filled = None

    def _write(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts one token into its slot. Returns the buffers; the mask hides their free slots.

        A token of a wider dtype than the buffers, as after a prompt under autocast, widens them, as
        joining the two would. The next step then makes buffers with fixed addresses of them.
        """
        slot = self.shared.slot
        assert slot is not None
        slot = slot.to(self._keys.device)
        if _wider(self._keys, key_states) != self._keys.dtype:
            self._keys = self._keys.to(_wider(self._keys, key_states))
        if _wider(self._values, value_states) != self._values.dtype:
            self._values = self._values.to(_wider(self._values, value_states))
        self._keys.index_copy_(2, slot, key_states.to(self._keys.dtype))
        self._values.index_copy_(2, slot, value_states.to(self._values.dtype))
        return self.with_quantized(self._keys, self._values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends the new tokens. Returns the stored and the new ones, uncompressed.

        More than one new token is a prompt, unless the cache is `appending` or `is_read`. What is
        stored of a prompt goes through the marker op, which the graph pass replaces.
        """
        watched = self.awaits
        self._check_reading()
        if self.shared.stepping:
            return self._write(key_states, value_states)
        self.settle()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stored, new = self.stored, key_states.shape[-2]
        keys = torch.cat([self._keys, key_states], dim=-2)
        values = torch.cat([self._values, value_states], dim=-2)
        if new == 1 or self.shared.appending or self.shared.is_read:
            self._keys, self._values = keys, values
            self.seen = self.seen + new
            return self.with_quantized(keys, values)
        keys, values = self.with_quantized(keys, values)
        if self.quantized is not None:
            self.earlier, self.quantized = self.quantized, None
        self.shared.compacts = True
        self.handed = keys.shape[-2] if watched else None
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
            turn_start=self._turn_start(keys),
            seen=self.seen - self.retired,
            has_layout=has_layout,
            mask_fits=self.shared.mask_fits,
        )
        written = Written(*STARKV.cache_write(**arguments._asdict()))
        self._keys, self._values = written.key, written.value
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
        """How new each token at `index` was in its own prompt, 1 if unknown; of the same shape."""
        known = index.new_ones(index.shape[:-1] + (0,)) if self.novelty is None else self.novelty
        return F.pad(known.float(), (0, index.shape[-1] - known.shape[-1]), value=1.0)

    @property
    def _known(self) -> int:
        """How many tokens the last compaction left."""
        return 0 if self.kept is None else self.kept.shape[-1]

    def _layout(self, index: torch.Tensor, stored: int) -> tuple[Layout, torch.Tensor, bool]:
        """Layout of what is stored (by head if heads keep sets), its counts, and if it is known."""
        layout = self.shared.layout
        if layout is None or layout.seen != self.seen:  # the model stores tokens of its own as well
            text = torch.full_like(index, -1)
            current = text.flatten(1)[:, :1]
            return Layout(text, text, text, current), text.new_zeros(len(text), 2), False
        current = layout.current
        current = torch.where(current >= 0, current + stored, current)
        if layout.earlier is not None:
            current = stored_slots(index, layout.earlier, current)
        described = [layout.frame, layout.row, layout.column]
        if index.dim() == 3:
            described = [t[:, None].expand(-1, index.shape[1], -1) for t in described]
        frame, row, column = (t.gather(-1, index) for t in described)
        return Layout(frame, row, column, current), layout.counts, True

    def _turn_start(self, keys: torch.Tensor) -> torch.Tensor:
        """[1] int64 as in `SharedState`; 0 if nobody said where chunks begin."""
        start = self.shared.turn_start
        if start is None:
            return torch.zeros(1, dtype=torch.int64, device=keys.device)
        return start

    def _state(self, keys: torch.Tensor, current: torch.Tensor) -> State:
        """The state so far, its pattern as wide as the current frame."""
        if self.state is None:
            return fresh_state(keys, current)
        state = State(*self.state)
        room = current.shape[1] - state.pattern.shape[-1]
        return state._replace(pattern=F.pad(state.pattern, (0, room)))

    def get_seq_length(self) -> int:
        """Tokens seen. A graph that decodes into buffers gets a tensor, as from a static cache."""
        slot = self.shared.slot
        if self.shared.stepping and slot is not None and torch.compiler.is_compiling():
            return slot[0] + self.dropped  # type: ignore[return-value]
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns (tokens stored plus new ones, tokens dropped).

        The second number is an offset: it aligns the mask with the last `stored` columns. Padding
        is on the left, so the padding still stored is what falls into those columns. Free slots of
        a buffer are columns of later tokens, which causality hides.
        """
        if self.shared.stepping:
            return self.coded + self._keys.shape[-2], self.dropped - self.coded
        if self.shared.uneven:
            raise CacheError(ONE_PROMPT)
        self.settle()
        self.shared.mask_fits = True
        return self.stored + query_length, self.seen - self.stored

    def reset(self) -> None:
        # transformers 5.17 would put zeros in their place, and then append to these.
        self._clear()
        self._keys = self._values = None
        self.is_initialized = False
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens, given as a negative number.

        Raises:
            CacheError: the number is positive, or larger than the number of tokens after the last
                compaction.
        """
        if tokens_to_remove > 0:
            raise CacheError(
                f"crop({tokens_to_remove}): pass the number of tokens to remove as a negative "
                "number"
            )
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        remove, known = -tokens_to_remove, self._known
        if self.seen == self.stored:  # as in transformers, all of them at the most
            remove = min(remove, self.seen)
        if remove > self.stored - known and self.seen != self.stored:
            raise CacheError(
                f"crop({tokens_to_remove}): only {self.stored - known} tokens came after the last "
                "compaction; older ones were compressed and cannot be rolled back. Fork the cache "
                "before a prompt that you may want to undo, or start a new one"
            )
        self.settle()
        end = max(0, self.in_full - remove)
        if self.quantized is not None:
            coded = min(self.coded, self.stored - remove)
            self.quantized = self.quantized.first(coded) if coded else None
        self.hold(self._keys[..., :end, :], self._values[..., :end, :])
        self.seen -= remove
        if self.kept is not None:
            self.kept = self.kept[..., : self.stored]
        if self.novelty is not None:
            self.novelty = self.novelty[..., : self.stored]

    def places(self) -> torch.Tensor:
        """[B, (G,) stored]: place in the stream of each token stored."""
        return self._places(self.stored, 0, self._keys)

    def novelties(self) -> torch.Tensor:
        """[B, (G,) stored] float32: how new each token stored was in its own prompt."""
        return self._novelties(self.places())

    def keep_only(self, stay: torch.Tensor) -> None:
        """Keeps only the tokens in slots `stay`, in every batch row: [n], or [G, n] by head."""
        places = self.places()
        slots = stay.expand(*places.shape[:-1], -1)
        novelty = self._novelties(places)
        self.kept, self.novelty = places.gather(-1, slots), novelty.gather(-1, slots)
        self.settle()
        in_full = int((slots >= self.coded).sum(-1).min())
        rows = stay.expand(*self._keys.shape[:2], -1)[..., None]
        keys, values = (
            t.gather(2, rows.expand(-1, -1, -1, t.shape[-1])) for t in self.in_model_precision()
        )
        self.earlier, self.quantized = self.quantized, None
        self.hold(keys, values)
        if self.earlier is not None:
            self.quantize(self.nbits, in_full)

    def quantize(self, nbits: int, in_full: int) -> None:
        """Stores all tokens but the newest `in_full` in codes of `nbits`; 16: none.

        Those that had codes before get these back.
        """
        self.settle()
        tokens = self.stored - in_full
        if tokens <= 0 or self.quantized is not None or nbits == 16:
            self.earlier = None
            return
        self.nbits = nbits
        older = self._keys[:, :, :tokens], self._values[:, :, :tokens]
        place = self.places()[..., :tokens].contiguous()
        newer = self._keys[:, :, tokens:].clone(), self._values[:, :, tokens:].clone()
        with torch.no_grad():
            self.quantized = quantize_tokens(*older, place, nbits, self.earlier)
        self.hold(*newer)
        self.earlier = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that the layer holds, as `checks.check_state` knows it."""
        self.settle()
        keys, values = self.tokens_in_full()
        codes = self.quantized and {
            "nbits": self.nbits,
            "key": list(self.quantized.key),
            "value": list(self.quantized.value),
        }
        facts = {name: getattr(self, name) for name in LAYER_FACTS}
        return {"keys": keys, "values": values, "codes": codes, **facts}

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned and `checks.check_state` has checked."""
        if stored["keys"] is None:
            return
        self.lazy_initialization(stored["keys"], stored["values"])
        self.hold(stored["keys"], stored["values"])
        for name in LAYER_FACTS:
            setattr(self, name, stored[name])
        self.state = None if self.state is None else tuple(self.state)
        codes = stored["codes"]
        if codes is not None:
            self.nbits = codes["nbits"]
            key, value = (Quantized(*codes[side]) for side in ("key", "value"))
            assert self.kept is not None
            place = self.kept[..., : key.tokens].contiguous()
            self.quantized = QuantizedTokens(key, value, place)

    def fork(self, shared: SharedState) -> StarKVLayer:
        """Returns a copy for another cache. Both share their storage until they grow."""
        self.settle()
        twin = StarKVLayer(shared)
        twin.__dict__.update({**vars(self), "shared": shared})
        return twin

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps, repeats or reorders batch rows of everything that the layer holds."""
        if not self.is_initialized:
            return
        keys, values = self._keys[rows], self._values[rows]
        if self.filled is not None and keys.shape == self._keys.shape:  # their addresses stay
            self._keys.copy_(keys)
            self._values.copy_(values)
        else:
            self._keys, self._values = keys, values
        if self.quantized is not None:
            self.quantized = self.quantized.select_rows(rows)
        if self.kept is not None:
            self.kept = self.kept[rows]
        if self.novelty is not None:
            self.novelty = self.novelty[rows]
        if self.state is not None:
            self.state = tuple(t[rows] for t in self.state)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.select_rows(beam_idx.to(self._keys.device) if self.is_initialized else beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            rows = torch.arange(self._keys.shape[0], device=self._keys.device)
            self.select_rows(rows.repeat_interleave(repeats))


def _wider(stored: torch.Tensor, new: torch.Tensor) -> torch.dtype:
    """The dtype that `torch.cat` would give both."""
    return torch.promote_types(stored.dtype, new.dtype)


@torch.inference_mode(False)
def _with_room(tokens: torch.Tensor, room: int) -> torch.Tensor:
    """Returns a copy of [B, G, stored, D] with `room` more slots.

    They are zeros, because a mask hides finite values only. Inference mode is off, because code
    outside it may not write to tensors that were made inside.
    """
    batch, groups, stored, dim = tokens.shape
    buffer = tokens.new_zeros(batch, groups, stored + room, dim)
    buffer[:, :, :stored] = tokens
    return fixed_address(buffer)


def fixed_address(tensor: torch.Tensor) -> torch.Tensor:
    """Marks the address of the tensor as fixed, so that CUDA graphs may write to it."""
    torch._dynamo.mark_static_address(tensor, guard=False)
    return tensor
