"""The decoder of a model: what its ports are, and modules that call it on plain tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...cache.cache import StarKVCache
from ...cache.layer import StarKVLayer
from ...errors import UnsupportedModel, root_cause
from ...hf.cache_argument import with_cache
from ...vision.layout import VisionLayout
from .ports import Layer, Shapes
from .slots import SlotLayer, write_slots

STATE = 4  # tensors of `reference.star.State`


class Decoder(nn.Module):
    """Embedding, decoder and head of a Hugging Face model; the vision tower is not part of it."""

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
                f"{type(model).__name__}: transformers does not know which its input embeddings are"
            ) from error
        self.config = model.config

    def new_cache(self) -> StarKVCache:
        return StarKVCache(self.config)

    def run(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        cache: StarKVCache,
        **more: Any,
    ) -> torch.Tensor:
        """Logits [B, vocabulary] of the last token; the cache is extended."""
        out = self.decoder(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
            **with_cache(cache),
            **more,
        )
        return self.head(out.last_hidden_state[:, -1:])[:, 0].float()


class Prefill(nn.Module):
    """A prompt on what is stored: ports as `ports.prefill_ports` lists them."""

    def __init__(self, decoder: Decoder, shapes: Shapes) -> None:
        super().__init__()
        self.inner, self.shapes = decoder, shapes

    def forward(self, ports: list[torch.Tensor]) -> list[torch.Tensor]:
        values = iter(ports)
        ids, positions, mask = next(values), next(values), next(values)
        embeds, more = self._embed(ids, values)
        frame, row, column, current, counted = (next(values) for _ in range(5))
        layout = VisionLayout(frame, row, column, current, counted)
        cache = self.inner.new_cache()
        cache.shared.layout = layout
        retired = layout.seen - next(values).shape[0]
        seen = layout.seen - ids.shape[1]
        given = [[next(values) for _ in range(4 + STATE)] for _ in self.shapes.layers]
        cache.layers = [self._layer(cache, seen, retired, *one) for one in given]
        logits = self.inner.run(embeds, positions, mask, cache, **more)
        found = [logits]
        for layer in cache.compressed_layers:
            assert layer.kept is not None
            assert layer.novelty is not None
            assert layer.state is not None
            pair = [layer.keys, layer.values]
            if self.shapes.slots:
                first = torch.zeros_like(layer.kept[:, 0])
                pair = [write_slots(next(values), new, first) for new in pair]
            found += [*pair, layer.kept, layer.novelty, *layer.state]
        return found

    def _embed(
        self, ids: torch.Tensor, values: Iterator[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        if not self.shapes.images:
            return self.inner.embed(ids), {}
        is_image, images = next(values), next(values)
        # The placeholder's id need not be in the table.
        text = self.inner.embed(ids.masked_fill(is_image, 0))
        embeds = torch.where(is_image[..., None], images, text)
        if not self.shapes.deepstack:
            return embeds, {}
        added = [
            next(values).masked_fill(~is_image[..., None], 0.0)
            for _ in range(self.shapes.deepstack)
        ]
        return embeds, {"visual_pos_masks": is_image, "deepstack_visual_embeds": added}

    def _layer(
        self,
        cache: StarKVCache,
        seen: int,
        retired: int,
        key: torch.Tensor,
        value: torch.Tensor,
        kept: torch.Tensor,
        novelty: torch.Tensor,
        *state: torch.Tensor,
    ) -> StarKVLayer:
        layer = StarKVLayer(cache.shared)
        layer.lazy_initialization(key, value)
        layer.keys, layer.values, layer.kept, layer.novelty = key, value, kept, novelty
        layer.seen, layer.retired = seen, retired
        layer.state = state
        return layer


class Decode(nn.Module):
    """One further token a row, appended: ports as `ports.decode_ports` lists them."""

    def __init__(self, decoder: Decoder, shapes: Shapes) -> None:
        super().__init__()
        self.inner, self.shapes = decoder, shapes

    def forward(self, ports: list[torch.Tensor]) -> list[torch.Tensor]:
        values = iter(ports)
        ids, positions, mask = next(values), next(values), next(values)
        cache = self.inner.new_cache()
        seen = mask.shape[1] - 1
        layers = []
        for _ in self.shapes.layers:
            layer = StarKVLayer(cache.shared)
            key, value = next(values), next(values)
            layer.lazy_initialization(key, value)
            layer.keys, layer.values, layer.seen = key, value, seen
            layers.append(layer)
        cache.layers = layers
        found = [self.inner.run(self.inner.embed(ids), positions, mask, cache)]
        for layer in layers:
            found += [layer.keys, layer.values]
        return found


class DecodeInSlots(nn.Module):
    """The same, written into buffers. No length but the batch's varies in this graph."""

    def __init__(self, decoder: Decoder, shapes: Shapes) -> None:
        super().__init__()
        self.inner, self.shapes = decoder, shapes

    def forward(self, ports: list[torch.Tensor]) -> list[torch.Tensor]:
        ids, positions, mask, slot, *past = ports
        cache = self.inner.new_cache()
        cache.layers = [
            SlotLayer(cache.shared, key, value, slot)
            for key, value in zip(past[::2], past[1::2], strict=True)
        ]
        read = mask.bool()[:, None, None]  # the library takes a mask of four dimensions as it is
        found = [self.inner.run(self.inner.embed(ids), positions, read, cache)]
        for layer in cache.compressed_layers:
            found += [layer.keys, layer.values]
        return found


def describe(model: Any, decoder: Decoder) -> Shapes:
    """The model's shapes, from what its decoder would return for four tokens.

    Raises:
        UnsupportedModel: a layer stores something else than keys and values of every token, or
            the decoder needs other inputs.
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
    positions = places.expand(3, 1, -1) if rows else places[None]
    mask = torch.ones(1, tokens, dtype=torch.int64, device=weight.device)
    cache = decoder.new_cache()
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):  # shapes alone
            logits = decoder.run(embeds, positions, mask, cache)
    except Exception as error:  # of any kind: the model's own code runs here
        raise UnsupportedModel(
            f"{type(model).__name__}: its decoder cannot be called with embeddings, positions, a "
            f"mask and a cache alone ({root_cause(error)})"
        ) from error
    others = {type(n).__name__ for n in cache.layers if not isinstance(n, StarKVLayer)}
    if others or not cache.layers:
        kinds = ", ".join(sorted(others)) or "nothing"
        raise UnsupportedModel(
            f"{type(model).__name__} stores {kinds} as well, which export does not know; only "
            "models whose every layer caches all keys and values can be exported"
        )
    empty = [i for i, layer in enumerate(cache.compressed_layers) if not layer.is_initialized]
    if empty:
        raise UnsupportedModel(
            f"{type(model).__name__} stores nothing of a text in layers {empty}, which export does "
            "not know; only models whose every layer caches all keys and values can be exported"
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


def _deepstack(model: Any, decoder: Any) -> int:
    vision = getattr(model.config, "vision_config", None)
    if not hasattr(decoder, "_deepstack_process"):
        return 0
    return len(getattr(vision, "deepstack_visual_indexes", ()))


@contextlib.contextmanager
def traceable(decoder: Any) -> Iterator[None]:
    """Qwen3-VL picks the image tokens out, adds to them and puts them back; we add zeros elsewhere.

    The same sums, and no list of places, which ONNX runtimes and TensorRT have no fixed shape for.
    """
    if not hasattr(decoder, "_deepstack_process"):
        yield
        return
    decoder._deepstack_process = lambda hidden, mask, features: hidden + features
    try:
        yield
    finally:
        del decoder._deepstack_process
