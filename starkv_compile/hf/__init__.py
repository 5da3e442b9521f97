"""What depends on transformers: the name of its cache argument, checkpoints, packed rows."""

from __future__ import annotations

from .cache_argument import cache_argument, pop_cache, with_cache
from .checkpoints import check_folder, load_pretrained, read_config
from .packed_rows import is_packed, known_as_unpacked

__all__ = [
    "cache_argument",
    "check_folder",
    "is_packed",
    "known_as_unpacked",
    "load_pretrained",
    "pop_cache",
    "read_config",
    "with_cache",
]
