"""The cache of a compressed model, and how many bytes it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names
from .size import (
    cache_bytes,
    full_bytes,
    layer_bytes,
    layer_stats,
    token_bytes,
)

if TYPE_CHECKING:
    from .cache import StarKVCache
    from .layer import StarKVLayer

# These import transformers, which the counting of bytes does not need.
__getattr__ = lazy_names(__name__, {"StarKVCache": "cache", "StarKVLayer": "layer"})

__all__ = [
    "StarKVCache",
    "StarKVLayer",
    "cache_bytes",
    "full_bytes",
    "layer_bytes",
    "layer_stats",
    "token_bytes",
]
