"""The decoder of a model: its shapes, and modules that call it on plain tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...cache.cache import StarKVCache
from ...cache.layer import StarKVLayer
from ...cache.quantized import QuantizedTokens
from ...errors import UnsupportedModel, root_cause
from ...hf.cache_argument import with_cache
from ...kernels.reference.quantization import Quantized
from ...kernels.reference.star import State
from ...vision.layout import VisionLayout
from .ports import Layer, Shapes, deepstack, fields_of, of_layer
from .slots import SlotLayer, write_slots

Tensors = dict[str, torch.Tensor]


class Decoder(nn.Module):
    """Embedding, decoder and head of a Hugging Face model, without its vision tower."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not hasattr(model, "get_decoder") or model.get_output_embeddings() is None:
            raise UnsupportedModel(
                f"{type(model).__name__} has no get_decoder() with an output layer, so there is "
                "nothing to export"
            )
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        try:
            self.embed = model.get_input_embeddings()
        except NotImplementedError as error:
            raise UnsupportedModel(
                f"{type(model).__name__}: transformers does not know its input embeddings"
            ) from error
        self.config = model.config

    def new_cache(self) -> StarKVCache:
        return StarKVCache(self.config)

    def run(
        self,
        embeds: torch.Tensor,
        ports: Tensors,
        cache: StarKVCache,
        **more: Any,
    ) -> torch.Tensor:
        """Returns the logits [B, vocabulary] of the last token, and extends the cache.

        ports: it reads `position_ids` and `attention_mask`.
        """
        out = self.decoder(
            inputs_embeds=embeds,
            position_ids=ports["position_ids"],
            attention_mask=ports["attention_mask"],
            use_cache=True,
            **with_cache(cache),
            **more,
        )
        return self.head(out.last_hidden_state[:, -1:])[:, 0].float()


class Prefill(nn.Module):
    """A prompt after stored tokens. Its ports are those of `ports.prefill_ports`."""

    def __init__(self, decoder: Decoder, shapes: Shapes) -> None:
        super().__init__()
        self.inner, self.shapes = decoder, shapes

    def forward(self, ports: Tensors) -> Tensors:
        ids = ports["input_ids"]
        embeds, more = self._embed(ports)
        layout = VisionLayout(
            frame=ports["frame"],
            row=ports["row"],
            column=ports["column"],
            current=ports["current"],
            counted=ports["counted"],
        )
        cache = self.inner.new_cache()
        cache.shared.layout, cache.shared.turn_start = layout, ports["turn_start"]
        cache.layers = [
            self._layer(
                cache,
                fields_of("past", i, ports),
                seen=layout.seen - ids.shape[1],
                retired=layout.seen - ports["budgeted"].shape[0],
            )
            for i in range(len(self.shapes.layers))
        ]
        found = {"logits": self.inner.run(embeds, ports, cache, **more)}
        for i, layer in enumerate(cache.compressed_layers):
            assert layer.kept is not None
            assert layer.novelty is not None
            assert layer.state is not None
            pair = {"key": layer.keys, "value": layer.values}
            if self.shapes.slots:
                first = torch.zeros_like(layer.kept[:, 0])
                buffers = fields_of("buffer", i, ports)
                pair = {name: write_slots(buffers[name], pair[name], first) for name in pair}
            state = State(*layer.state)._asdict()
            fields = {**pair, "kept": layer.kept, "novelty": layer.novelty, **state}
            found |= of_layer("present", i, fields)
        return found

    def _embed(self, ports: Tensors) -> tuple[torch.Tensor, dict[str, Any]]:
        ids = ports["input_ids"]
        if not self.shapes.images:
            return self.inner.embed(ids), {}
        is_image, images = ports["image_mask"], ports["image_embeds"]
        # The placeholder's id need not be in the table.
        text = self.inner.embed(ids.masked_fill(is_image, 0))
        embeds = torch.where(is_image[..., None], images, text)
        if not self.shapes.deepstack:
            return embeds, {}
        added = [
            ports[name].masked_fill(~is_image[..., None], 0.0)
            for name in deepstack(self.shapes.deepstack)
        ]
        return embeds, {"visual_pos_masks": is_image, "deepstack_visual_embeds": added}

    def _layer(self, cache: StarKVCache, past: Tensors, seen: int, retired: int) -> StarKVLayer:
        layer = _stored_layer(cache, past, seen)
        layer.kept, layer.novelty, layer.retired = past["kept"], past["novelty"], retired
        layer.state = tuple(past[name] for name in State._fields)
        return layer


class Decode(nn.Module):
    """One more token for each row, appended. Its ports are those of `ports.decode_ports`."""

    def __init__(self, decoder: Decoder, shapes: Shapes) -> None:
        super().__init__()
        self.inner, self.shapes = decoder, shapes

    def forward(self, ports: Tensors) -> Tensors:
        cache = self.inner.new_cache()
        cache.layers = [
            _stored_layer(
                cache, fields_of("past", i, ports), seen=ports["attention_mask"].shape[1] - 1
            )
            for i in range(len(self.shapes.layers))
        ]
        if self.shapes.nbits < 16:
            for i, layer in enumerate(cache.compressed_layers):
                layer.quantized = _quantized(fields_of("coded", i, ports))
        logits = self.inner.run(self.inner.embed(ports["input_ids"]), ports, cache)
        return {"logits": logits, **_pairs(cache)}


class DecodeInSlots(nn.Module):
    """The same, written into buffers. Only the batch varies in this graph."""

    def __init__(self, decoder: Decoder, shapes: Shapes) -> None:
        super().__init__()
        self.inner, self.shapes = decoder, shapes

    def forward(self, ports: Tensors) -> Tensors:
        cache = self.inner.new_cache()
        cache.layers = [
            SlotLayer(cache.shared, past["key"], past["value"], ports["slot"])
            for past in (fields_of("past", i, ports) for i in range(len(self.shapes.layers)))
        ]
        # transformers uses a mask of four dimensions as it is.
        read = ports["attention_mask"].bool()[:, None, None]
        tokens = {**ports, "attention_mask": read}
        logits = self.inner.run(self.inner.embed(ports["input_ids"]), tokens, cache)
        return {"logits": logits, **_pairs(cache)}


def _stored_layer(cache: StarKVCache, past: Tensors, seen: int) -> StarKVLayer:
    """A layer that holds keys and values of the past."""
    layer = StarKVLayer(cache.shared)
    layer.lazy_initialization(past["key"], past["value"])
    layer.hold(past["key"], past["value"])
    layer.seen = seen
    return layer


def _quantized(coded: Tensors) -> QuantizedTokens:
    """Tokens in few bits of the ports of `ports.codes`. Attention does not read their places."""
    key, value = (
        Quantized(*(coded[f"{side}_{part}"] for part in Quantized._fields))
        for side in ("key", "value")
    )
    return QuantizedTokens(key, value, key.codes.new_empty(0))


def _pairs(cache: StarKVCache) -> Tensors:
    """Keys and values of each layer, with names of the decoding graph's ports as keys.

    Only those in the model's precision: codes stay as they are.
    """
    found: Tensors = {}
    for i, layer in enumerate(cache.compressed_layers):
        keys, values = layer.tokens_in_full()
        found |= of_layer("present", i, {"key": keys, "value": values})
    return found


def describe(model: Any, decoder: Decoder) -> Shapes:
    """Returns the model's shapes, from what its decoder would return for four tokens.

    Raises:
        UnsupportedModel: a layer does not store keys and values of every token, or the decoder
            needs other inputs.
    """
    weight = decoder.embed.weight
    hidden = int(
        decoder.embed(torch.zeros(1, 1, dtype=torch.int64, device=weight.device)).shape[-1]
    )
    core = getattr(model, "model", None)
    rows = 3 if hasattr(core, "get_rope_index") else 0
    tokens = 4
    embeds = torch.zeros(1, tokens, hidden, dtype=weight.dtype, device=weight.device)
    places = torch.arange(tokens, device=weight.device)
    ports = {
        "position_ids": places.expand(3, 1, -1) if rows else places[None],
        "attention_mask": torch.ones(1, tokens, dtype=torch.int64, device=weight.device),
    }
    cache = decoder.new_cache()
    try:
        with torch.no_grad():
            with unchanged(decoder) as made, FakeTensorMode(allow_non_fake_inputs=True):
                logits = decoder.run(embeds, ports, cache)  # shapes alone
            if made:  # by a real call, so that tracing finds real tensors
                decoder.run(embeds, ports, decoder.new_cache())
    except Exception as error:  # of any kind: the model's own code runs here
        raise UnsupportedModel(
            f"{type(model).__name__}: its decoder cannot be called with embeddings, positions, a "
            f"mask and a cache alone ({root_cause(error)})"
        ) from error
    others = {type(n).__name__ for n in cache.layers if not isinstance(n, StarKVLayer)}
    if others or not cache.layers:
        kinds = ", ".join(sorted(others)) or "nothing"
        raise UnsupportedModel(
            f"{type(model).__name__} has {kinds} in its cache; export needs a model in which every "
            "layer caches all keys and values"
        )
    empty = [i for i, layer in enumerate(cache.compressed_layers) if not layer.is_initialized]
    if empty:
        raise UnsupportedModel(
            f"{type(model).__name__} stores nothing of a text in layers {empty}; export needs a "
            "model in which every layer caches all keys and values"
        )
    layers = tuple(
        Layer(n.keys.shape[1], n.keys.shape[3], n.values.shape[3]) for n in cache.compressed_layers
    )
    return Shapes(
        layers=layers,
        hidden=hidden,
        vocabulary=logits.shape[-1],
        dtype=weight.dtype,
        position_rows=rows,
        images=hasattr(model, "get_image_features"),
        deepstack=_deepstack(model, decoder.decoder),
    )


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[list[str]]:
    """Gives all modules in `module` their attributes and buffers back.

    Some make tensors at their first call, such as the frequencies of longrope in transformers. A
    fake tensor among them would stay in the user's model.

    Yields:
        A list, which at the end has the names of what was set or made.
    """
    before = [(one, dict(vars(one)), dict(one._buffers)) for one in module.modules()]
    made: list[str] = []
    try:
        yield made
    finally:
        for one, attributes, buffers in before:
            for now, then in ((vars(one), attributes), (one._buffers, buffers)):
                made += [name for name in now if now[name] is not then.get(name)]
                now.clear()
                now.update(then)


def _deepstack(model: Any, decoder: Any) -> int:
    vision = getattr(model.config, "vision_config", None)
    if not hasattr(decoder, "_deepstack_process"):
        return 0
    return len(getattr(vision, "deepstack_visual_indexes", ()))


@contextlib.contextmanager
def traceable(decoder: Any) -> Iterator[None]:
    """Makes Qwen3-VL's addition of image features traceable: other tokens get zeros.

    Qwen3-VL picks the image tokens out, adds to them and puts them back. The sums here are the
    same, without a list of places, whose shape ONNX runtimes and TensorRT could not know.
    """
    if not hasattr(decoder, "_deepstack_process"):
        yield
        return
    decoder._deepstack_process = lambda hidden, mask, features: hidden + features
    try:
        yield
    finally:
        del decoder._deepstack_process
