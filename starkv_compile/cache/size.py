"""How many bytes a cache holds."""

from __future__ import annotations

from typing import Any

import torch


def stored_bytes(cache: Any) -> int:
    """Bytes of the storages that hold the keys and values of a Hugging Face cache, all layers."""
    return sum(
        tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(tensor, torch.Tensor)
    )
