"""What depends on transformers: the name of its cache argument, checkpoints, packed rows."""

from __future__ import annotations

from .cache_argument import pop_cache, with_cache
from .checkpoints import check_folder, load_pretrained, read_config

__all__ = ["check_folder", "load_pretrained", "pop_cache", "read_config", "with_cache"]
