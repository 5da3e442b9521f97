"""The cache that a compressed model writes to, and what it counts."""

from __future__ import annotations

from .cache import StarKVCache

__all__ = ["StarKVCache"]
