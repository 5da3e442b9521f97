"""Bytes that a model takes: its weights, its cache and the peak of a prompt. Allocates nothing.

Models are built of fake tensors, which have shapes but no contents. So the numbers come from the
model's own code, for every family, and need no formula.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from starkv_compile import StarKVConfig, UnsupportedModel
from starkv_compile.hf import with_cache
from starkv_compile.kernels.reference import row_bytes


@dataclass(frozen=True)
class LayerSize:
    """The cache of one layer.

    token_bytes: bytes of one token's keys and values, one row. heads: (number, head size) of keys
    and of values. window: tokens that a sliding window keeps; None: all. shortened: whether starkv
    compresses it.
    """

    token_bytes: int
    heads: tuple[tuple[int, int], ...]
    window: int | None
    shortened: bool

    def nbytes(self, tokens: int, kept: int, nbits: int = 16) -> int:
        """Bytes after a prompt of `tokens`, of which a compressed layer keeps `kept`.

        nbits: as the option of starkv; 16: the model's precision.
        """
        stored = kept if self.shortened else tokens
        stored = stored if self.window is None else min(stored, self.window)
        if nbits == 16 or not self.shortened:
            return self.token_bytes * stored
        in_full = min(stored, StarKVConfig().window)
        row = sum(number * row_bytes(size, nbits) for number, size in self.heads)
        centres = sum(number * size * 4 for number, size in self.heads) if stored > in_full else 0
        return self.token_bytes * in_full + row * (stored - in_full) + centres


class ModelSize:
    """A model without contents.

    Args:
        config: configuration of transformers.
        dtype: type of weights and cache.

    Raises:
        UnsupportedModel: it cannot be built, or its decoder does not run on embeddings.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        self._mode, self.dtype = FakeTensorMode(allow_non_fake_inputs=True), dtype
        self._text = config.get_text_config(decoder=True)
        has_images = config is not self._text or hasattr(config, "vision_config")
        kind = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
        try:
            with torch.device("meta"):  # where nothing is initialised
                model = kind.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
            with self._mode:
                model.to_empty(device="cpu")
                self._decoder = model.get_decoder()
                self.weights = sum(p.numel() * p.element_size() for p in model.parameters())
                self.layers = self._layers()
        except Exception as error:  # of the library, by what is wrong
            why = str(error).strip().split("\n")[0]
            raise UnsupportedModel(
                f"a {config.model_type} cannot be measured without its weights ({why})"
            ) from error

    def cache_bytes(self, tokens: int, kept: int | None = None, nbits: int = 16) -> int:
        """Bytes of the cache after a prompt of `tokens`.

        kept: tokens of a compressed layer. None: all. nbits: as the option of starkv.
        """
        kept = tokens if kept is None else min(kept, tokens)
        return sum(layer.nbytes(tokens, kept, nbits) for layer in self.layers)

    def prompt_bytes(self, tokens: int, past: int = 0, kept: int | None = None) -> int:
        """Peak bytes of tensors while the decoder reads `tokens`, without weights, with the cache.

        The decoder runs eagerly; a compiled one needs less. Logits are those of the last token.
        What scores need is not counted.

        past: tokens that the cache holds already. kept: tokens that a compressed layer stores once
        it has read the prompt. None: all.
        """
        with self._mode:
            cache = DynamicCache(config=self._text)
            if past:
                self._read(past, cache)
                for layer in cache.layers:  # what reading them took is not counted
                    layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            held = [t for x in cache.layers for t in (x.keys, x.values)] if past else []
            if kept is not None:
                for layer in cache.layers:
                    if type(layer) is DynamicLayer:
                        _shorten(layer, kept)
            peak = Peak(held)
            del held  # so that a layer frees what it replaces
            with peak:
                self._read(tokens, cache)
        return peak.nbytes

    def _layers(self) -> list[LayerSize]:
        cache = DynamicCache(config=self._text)
        self._read(2, cache)
        found = []
        for layer in cache.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if not isinstance(layer, DynamicLayer) or keys is None or values is None:
                continue  # linear attention keeps a state of one size
            sliding = isinstance(layer, DynamicSlidingWindowLayer)
            window = layer.sliding_window if sliding else None
            nbytes = keys.nbytes + values.nbytes
            heads = tuple((t.shape[1], t.shape[3]) for t in (keys, values))
            found.append(LayerSize(nbytes // 2, heads, window, type(layer) is DynamicLayer))
        return found

    @torch.no_grad()
    def _read(self, tokens: int, cache: Any) -> None:
        embedded = torch.empty(1, tokens, self._text.hidden_size, dtype=self.dtype)
        self._decoder(inputs_embeds=embedded, use_cache=True, **with_cache(cache))


def _shorten(layer: Any, kept: int) -> None:
    """Lets the layer store `kept` tokens of those that it hands to its attention."""
    update = layer.update

    def shortened(*args: Any, **kwargs: Any) -> Any:
        keys, values = update(*args, **kwargs)
        layer.keys, layer.values = keys[:, :, :kept].clone(), values[:, :, :kept].clone()
        return keys, values

    layer.update = shortened


class Peak(TorchDispatchMode):
    """Counts the bytes of the storages that live at once: of tensors made inside, and of `held`."""

    def __init__(self, held: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        storages = [tensor.untyped_storage() for tensor in held]
        self._live = {StorageWeakRef(storage): storage.nbytes() for storage in storages}
        self.nbytes = sum(self._live.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(t.untyped_storage()) for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        self._live = {ref: size for ref, size in self._live.items() if not ref.expired()}
        for tensor in _tensors(result):
            ref = StorageWeakRef(tensor.untyped_storage())
            if ref not in given:
                self._live[ref] = tensor.untyped_storage().nbytes()
        self.nbytes = max(self.nbytes, sum(self._live.values()))
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
