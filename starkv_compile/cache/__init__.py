"""The cache that a compressed model writes to, and what it counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import StarKVCache


def __getattr__(name: str) -> Any:
    if name != "StarKVCache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .cache import StarKVCache  # transformers comes with it, which `size` does without

    return StarKVCache


__all__ = ["StarKVCache"]
