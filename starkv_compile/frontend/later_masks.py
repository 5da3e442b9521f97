"""Models that make a mask of their own in a later call only, when the cache is short already."""

from __future__ import annotations

import re
from typing import Any

from ..cache.cache import StarKVCache
from ..errors import CacheError, StarKVError
from ..passes.find_cache_writes import OWN_MASK
from ..reporting import Report

_OF_SIZES = re.compile(r"must match|broadcast", re.IGNORECASE)


def is_short(cache: Any) -> bool:
    """Whether it is a `StarKVCache` that has dropped tokens."""
    return isinstance(cache, StarKVCache) and cache.short_layer is not None


def check_failure(cache: Any, error: RuntimeError) -> None:
    """Raises `CacheError` if a call failed because its mask does not fit a cache that was short.

    cache: the cache of the call. error: what the model raised.
    """
    of_sizes = not isinstance(error, StarKVError) and _OF_SIZES.search(str(error))
    if of_sizes and is_short(cache) and not cache.shared.mask_fits:
        raise CacheError(_text(cache, "seems to have")) from error


def check_prompt(cache: StarKVCache, was_short: bool, report: Report) -> None:
    """Raises `CacheError` if a later prompt met a mask whose columns are those of other tokens.

    was_short: whether the cache had dropped tokens before. report: of the model.
    """
    if not was_short or cache.shared.mask_fits:
        return
    if any(site.reason == OWN_MASK for graph in report.graphs for site in graph.sites):
        raise CacheError(_text(cache, "has"))


def _text(cache: StarKVCache, has: str) -> str:
    layer = cache.short_layer
    assert layer is not None
    return (
        f"the mask of this call {has} a column for each token seen, but the cache stores "
        f"{layer.stored} of {layer.seen}. The model made the mask without asking the cache, and "
        "its first prompt had none, so starkv did not know. Give each prompt a new cache, or make "
        "masks with create_causal_mask of transformers.masking_utils, or with "
        "cache.get_mask_sizes(tokens, layer)"
    )
