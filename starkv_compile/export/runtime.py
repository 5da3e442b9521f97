"""Runs the graphs of an exported folder on a `StarKVCache`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..cache.cache import StarKVCache
from ..cache.chunk import DRAFTED_PROMPT, begin_chunk
from ..cache.layer import StarKVLayer
from ..cache.quantized import quantize_tokens
from ..errors import CacheError, StarKVError
from ..hf.cache_argument import with_cache
from ..kernels.reference.star import State
from .capture.ports import Shapes, deepstack, fields_of, of_layer
from .graphs import open_graph
from .onnx.manifest import Manifest

NARROWEST = 2
"""Least width of `current` and `pattern`, because traced graphs treat a length of 1 separately."""

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""What the vision tower encodes, and the argument that brings it."""


class Runtime:
    """Runs the graphs of a folder, and moves a cache's contents into and out of them."""

    def __init__(self, folder: Path, manifest: Manifest, provider: str) -> None:
        self.shapes: Shapes = manifest.shapes
        self.window = manifest.config.scoring_window
        self.max_seq = manifest.max_seq
        self._past = {
            f"past.{i}.{name}": f"present.{i}.{name}"
            for i in range(len(self.shapes.layers))
            for name in ("key", "value")
        }
        self._prefill = open_graph(folder / "prefill.onnx", provider)
        self._decode = open_graph(folder / "decode.onnx", provider)
        self._warned = False

    def begin_chunk(self, cache: StarKVCache, model: Any, named: dict[str, Any]) -> None:
        """Prepares `cache` for several new tokens. Warns once if a prompt comes with drafts."""
        first = cache.get_seq_length() == 0
        drafts = begin_chunk(cache, model, named)
        if drafts and first and not self._warned:
            self._warned = True
            warnings.warn(f"starkv left this call uncompressed: {DRAFTED_PROMPT}", stacklevel=3)

    @torch.no_grad()
    def forward(
        self,
        model: Any,
        *,
        input_ids: torch.Tensor,
        past_key_values: StarKVCache,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **named: Any,
    ) -> CausalLMOutputWithPast:
        """Returns what the model's own forward returns, for the last token (all with drafts)."""
        cache = past_key_values
        cache.check_bits(self.shapes.nbits)
        batch, new = input_ids.shape
        self._layers(cache, batch)
        seen = cache.get_seq_length()
        self._check_length(seen + new)
        if attention_mask is None:
            attention_mask = torch.ones(batch, seen + new, dtype=torch.int64)
        if attention_mask.shape != (batch, seen + new):
            raise StarKVError(
                f"attention_mask of shape {list(attention_mask.shape)}: {batch} rows with {seen} "
                f"tokens seen and {new} new ones need [{batch}, {seen + new}]"
            )
        if position_ids is None:
            position_ids = self._counted(model, cache, input_ids, attention_mask, named)
        positions = self._positions(position_ids)
        common = {"input_ids": input_ids, "attention_mask": attention_mask.long()}
        if new > 1 and not cache.shared.appending:
            features = self._features(model, input_ids, named)
            logits = self._prompt(cache, {**common, "position_ids": positions, **features})
            return CausalLMOutputWithPast(logits=logits[:, None], **with_cache(cache))
        self._check_text(model, input_ids, seen, named)
        cache.begin_turn()
        rows = [
            self._further(
                cache,
                {
                    "input_ids": input_ids[:, i : i + 1],
                    "attention_mask": common["attention_mask"][:, : seen + i + 1],
                    "position_ids": positions[..., i : i + 1],
                },
            )
            for i in range(new)
        ]
        return CausalLMOutputWithPast(logits=torch.stack(rows, 1), **with_cache(cache))

    def _check_length(self, tokens: int) -> None:
        if tokens > self.max_seq:
            raise StarKVError(
                f"{tokens} tokens, but the model was exported for at most {self.max_seq}; export "
                f"it again with --max-seq {tokens} or more"
            )

    def _counted(
        self,
        model: Any,
        cache: StarKVCache,
        ids: torch.Tensor,
        mask: torch.Tensor,
        named: dict[str, Any],
    ) -> torch.Tensor:
        """Positions for a call without any, counted as the model's own forward would."""
        seen, layout = cache.get_seq_length(), cache.shared.layout
        plain = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, seen:]
        pictures = _visual_tokens(model, ids).any() or (
            layout is not None and (layout.frame[:, :seen] >= 0).any()
        )
        if not self.shapes.position_rows or not pictures:
            return plain
        types = named.get("mm_token_type_ids")
        grids = {name: named.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        if seen or types is None or all(grid is None for grid in grids.values()):
            raise StarKVError(
                "position_ids are missing, and with images they do not follow from the tokens; "
                "pass position_ids, or for a first prompt mm_token_type_ids and image_grid_thw. "
                "generate and OnnxSession pass them"
            )
        return model.model.get_rope_index(ids, types, **grids, attention_mask=mask)[0]

    def _check_text(self, model: Any, ids: torch.Tensor, seen: int, named: dict[str, Any]) -> None:
        """Raises for images in a chunk that is stored token by token, where tokens count as text.

        Image tokens that the model itself wrote, or that were drafted, are text to the model too.
        """
        drafted = max(1, named.get("logits_to_keep", 1))
        prompt = ids[:, : ids.shape[1] - drafted] if seen else ids
        if bool(_visual_tokens(model, prompt).any()):
            raise StarKVError(
                "images cannot come together with drafted tokens, or as a prompt of one token; "
                "leave out assistant_model and prompt_lookup_num_tokens"
            )

    def _positions(self, given: torch.Tensor) -> torch.Tensor:
        rows = self.shapes.position_rows
        if not rows:
            return given
        return given.expand(rows, *given.shape) if given.dim() == 2 else given[-rows:]

    def _prompt(self, cache: StarKVCache, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
        layout, seen, start = cache.shared.layout, cache.get_seq_length(), cache.shared.turn_start
        batch, new = feeds["input_ids"].shape
        if layout is None or start is None or layout.seen != seen + new:
            raise StarKVError(
                "nothing shows what the prompt's tokens are; pass input_ids in place of embeddings"
            )
        width = max(NARROWEST, layout.current.shape[1])
        retired = cache.compressed_layers[0].retired if cache.layers else 0
        feeds |= {
            "frame": layout.frame,
            "row": layout.row,
            "column": layout.column,
            "current": F.pad(layout.current, (0, width - layout.current.shape[1]), value=-1),
            "counted": layout.counted,
            "turn_start": start,
            "budgeted": torch.ones(layout.seen - retired, dtype=torch.bool),
        }
        layers = self._layers(cache, batch)
        self._arrange(layers)
        for i, layer in enumerate(layers):
            assert layer.state is not None
            if layer.kept is not None and layer.kept.dim() == 3:
                raise CacheError(
                    "the session keeps a different set of tokens for each head (policy 'snapkv' or "
                    "one like it), but exported graphs keep one set; continue the session in torch"
                )
            keys, values = layer.in_model_precision()
            if self.shapes.slots:  # runtimes do not write these in place, so `past` may be a view
                feeds |= of_layer("buffer", i, {"key": keys, "value": values})
            state = State(*layer.state)
            room = width - state.pattern.shape[-1]
            past = {
                "key": keys[:, :, : layer.stored],
                "value": values[:, :, : layer.stored],
                "kept": layer.places(),
                "novelty": layer.novelties(),
                **state._replace(pattern=F.pad(state.pattern, (0, room)))._asdict(),
            }
            feeds |= of_layer("past", i, past)
        found = self._prefill(feeds)
        for i, layer in enumerate(layers):
            present = fields_of("present", i, found)
            state = State(*(present[name] for name in State._fields))
            pattern = state.pattern[..., : layout.current.shape[1]]
            layer.earlier, layer.quantized = layer.quantized, None
            layer.hold(present["key"], present["value"])
            layer.kept, layer.novelty = present["kept"], present["novelty"]
            layer.state = tuple(state._replace(pattern=pattern))
            layer.seen = layout.seen
            if self.shapes.slots:
                layer.filled = layer.kept.shape[1]
                layer.dropped = layer.seen - layer.filled
        if self.shapes.nbits < 16:
            cache.quantize(self.shapes.nbits, self.window)
        return found["logits"]

    def _arrange(self, layers: list[StarKVLayer], new: int = 0) -> None:
        """Brings keys and values into the graphs' form: with room for `new` tokens if in buffers.

        Raises:
            StarKVError: the buffers have no room for them.
        """
        for layer in layers:
            if self.shapes.nbits == 16:
                layer.drop_codes()
            if layer.tokens_in_full()[0].shape[2] != self.shapes.slots:
                layer.settle()
            if not self.shapes.slots:
                continue
            if layer.stored + new > self.shapes.slots:
                raise StarKVError(
                    f"{layer.stored + new} tokens to store, but the model was exported with "
                    f"{self.shapes.slots} slots; export it again with --slots "
                    f"{layer.stored + new} or more, or generate fewer tokens"
                )
            if layer.filled is None:
                layer.make_room(self.shapes.slots - layer.stored)

    def _layers(self, cache: StarKVCache, batch: int) -> list[StarKVLayer]:
        """Returns the cache's layers. New ones are empty, and all have a scoring state."""
        while len(cache.layers) < len(self.shapes.layers):
            cache.layers.append(StarKVLayer(cache.shared))
        for layer, shape in zip(cache.compressed_layers, self.shapes.layers, strict=True):
            if layer.is_initialized and layer.state is not None:
                continue
            key, value = (
                torch.zeros(batch, shape.heads, 0, dim, dtype=self.shapes.dtype)
                for dim in (shape.key_dim, shape.value_dim)
            )
            if not layer.stored:
                layer.lazy_initialization(key, value)
                layer.hold(key, value)
                layer.kept = torch.zeros(batch, 0, dtype=torch.int64)
            elif layer.kept is None:  # torch stored tokens as they are, without scores
                layer.kept = layer.places()
            zero = torch.zeros(batch, dtype=torch.int64)
            layer.state = tuple(
                State(
                    mi=torch.zeros(batch, shape.heads, dtype=torch.float32),
                    mi_steps=zero,
                    pattern=torch.zeros(batch, shape.heads, 1, dtype=torch.float32),
                    pattern_count=zero,
                )
            )
        return cache.compressed_layers

    def _further(self, cache: StarKVCache, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
        layers = cache.compressed_layers
        self._arrange(layers, 1)
        for i, layer in enumerate(layers):
            keys, values = layer.tokens_in_full()
            feeds |= of_layer("past", i, {"key": keys, "value": values})
            feeds |= self._codes(i, layer)
        if self.shapes.slots:
            feeds |= self._slot(layers[0].stored, feeds["attention_mask"])
            found = self._decode(feeds, self._past)
        else:
            found = self._decode(feeds)
        for i, layer in enumerate(layers):
            layer.hold(found[f"present.{i}.key"], found[f"present.{i}.value"])
            layer.seen += 1
            if layer.filled is not None:
                layer.filled += 1
        return found["logits"]

    def _codes(self, number: int, layer: StarKVLayer) -> dict[str, torch.Tensor]:
        """A layer's tokens in few bits, as ports of the decoding graph; {} in 16 bits."""
        if self.shapes.nbits == 16:
            return {}
        tokens = layer.quantized
        if tokens is None:
            key, value = (t[:, :, :0] for t in layer.tokens_in_full())
            place = layer.places()[..., :0]
            tokens = quantize_tokens(key, value, place, self.shapes.nbits, None)
        fields = {
            f"{side}_{part}": tensor
            for side, rows in (("key", tokens.key), ("value", tokens.value))
            for part, tensor in rows._asdict().items()
        }
        return of_layer("coded", number, fields)

    def _slot(self, stored: int, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Where the next token goes, and which slots it reads. Dropped padding was on the left."""
        read = mask[:, mask.shape[1] - stored - 1 :]
        room = self.shapes.slots - stored - 1
        slot = torch.full((len(mask),), stored)
        return {"attention_mask": F.pad(read, (0, room)), "slot": slot}

    def _features(
        self, model: Any, ids: torch.Tensor, named: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Features of images and videos in the places of their tokens."""
        if not self.shapes.images:
            given = [name for name in PIXELS.values() if named.get(name) is not None]
            if given:
                raise StarKVError(
                    f"{given[0]}: the model was exported as a text model; leave it out"
                )
            return {}
        wide = (*ids.shape, self.shapes.hidden)
        names = ["image_embeds", *deepstack(self.shapes.deepstack)]
        dense = {name: torch.zeros(wide, dtype=self.shapes.dtype) for name in names}
        for kind, pixels in PIXELS.items():
            places = ids == _token(model, kind)
            encoded = (named.get("mm_encoder_outputs") or {}).get(kind)
            if encoded is None and named.get(pixels) is not None:
                encode = getattr(model, f"get_{kind}_features")
                encoded = encode(named[pixels], named.get(f"{kind}_grid_thw"), return_dict=True)
            if encoded is None:
                if bool(places.any()):
                    raise StarKVError(f"the prompt has {kind} tokens, but no {pixels}; pass them")
                continue
            parts = [encoded.pooler_output, *getattr(encoded, "deepstack_features", [])]
            for whole, part in zip(dense.values(), parts, strict=True):
                _scatter(whole, part, places, kind)
        return {"image_mask": _visual_tokens(model, ids), **dense}


def _token(model: Any, kind: str) -> int:
    """Id of the token that features replace; -1, which no token has, if there is none."""
    token = getattr(model.config, f"{kind}_token_id", None)
    return -1 if token is None else token


def _visual_tokens(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[B, S] bool."""
    return torch.isin(ids, torch.tensor([_token(model, kind) for kind in PIXELS]))


def _scatter(whole: torch.Tensor, part: Any, places: torch.Tensor, kind: str) -> None:
    """Writes features into [B, S, E] at the tokens that they belong to."""
    features = part if isinstance(part, torch.Tensor) else torch.cat(tuple(part))
    features = features.reshape(-1, whole.shape[-1])
    tokens = int(places.sum())
    if len(features) != tokens:
        raise StarKVError(
            f"{len(features)} {kind} features for {tokens} {kind} tokens; expected one for each"
        )
    whole[places] = features.to(whole.dtype)
