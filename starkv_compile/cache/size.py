"""How many bytes a cache takes, a token takes, and an uncompressed cache would take.

Every number of bytes in a report, a budget or a benchmark comes from here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.reference.quantization import TokenBytes
from ..reporting import LayerStats

if TYPE_CHECKING:
    from .layer import StarKVLayer


def layer_bytes(layer: Any) -> int:
    """Bytes of the storages that hold keys and values of one layer of a Hugging Face cache.

    A storage counts in full, with the free slots of a buffer and with what a view leaves out.
    """
    quantized = getattr(layer, "quantized", None)
    names = ("keys", "values") if quantized is None else ("_keys", "_values")
    return (0 if quantized is None else quantized.nbytes) + sum(
        tensor.untyped_storage().nbytes()
        for tensor in (getattr(layer, name, None) for name in names)
        if isinstance(tensor, torch.Tensor)
    )


def cache_bytes(cache: Any) -> int:
    """`layer_bytes` of all layers of a Hugging Face cache."""
    return sum(layer_bytes(layer) for layer in cache.layers)


def token_bytes(layer: StarKVLayer) -> int:
    """Bytes of one token in all batch rows of a layer, in the model's precision.

    0 while the layer stores none.
    """
    if not layer.stored:
        return 0
    keys, values = layer.tokens_in_full()
    if keys.dim() == 3:  # latents without heads
        keys, values = keys[:, None], values[:, None]
    return keys.shape[0] * TokenBytes.of(keys, values, layer.nbits).full


def full_bytes(layers: Iterable[StarKVLayer]) -> int:
    """Bytes that the layers would take if they stored every token seen."""
    return sum(layer.seen * token_bytes(layer) for layer in layers)


def layer_stats(layers: Iterable[StarKVLayer]) -> list[LayerStats]:
    """The numbers of each layer that stores tokens."""
    return [
        LayerStats(
            stored=layer.stored,
            seen=layer.seen,
            nbytes=layer_bytes(layer),
            token_bytes=token_bytes(layer),
            left=layer.retired,
            coded=layer.coded,
            nbits=layer.nbits if layer.coded else 16,
        )
        for layer in layers
        if layer.stored
    ]
