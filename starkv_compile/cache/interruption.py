"""Notices a call that stopped between layers, so that some of them lack its tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer

from .cache import StarKVCache
from .layer import StarKVLayer


@contextlib.contextmanager
def whole_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Surrounds one call of a model. Marks its cache if the call stops between layers.

    An exception in the middle of a graph changes no layer. A model whose graph breaks between
    layers may stop after some of them have stored the new tokens.

    Args:
        args, kwargs: the model's arguments.

    Raises:
        CacheError: an earlier call with this cache stopped between layers.
    """
    caches = [given for given in (*args, *kwargs.values()) if isinstance(given, DynamicCache)]
    for cache in caches:
        if isinstance(cache, StarKVCache):
            cache.check_whole()
    before = [_lengths(cache) for cache in caches]
    try:
        yield
    except BaseException:
        for cache, lengths in zip(caches, before, strict=True):
            if isinstance(cache, StarKVCache):
                cache.shared.stopped_at = _where_it_stopped(lengths, _lengths(cache))
        raise


def _lengths(cache: DynamicCache) -> dict[int, int]:
    """Tokens that each layer has seen. Layers of linear attention do not count theirs."""
    return {
        number: layer.seen if isinstance(layer, StarKVLayer) else layer.get_seq_length()
        for number, layer in enumerate(cache.layers)
        if isinstance(layer, DynamicLayer)
    }


def _where_it_stopped(before: dict[int, int], after: dict[int, int]) -> dict[int, int] | None:
    """What layers have seen, if some of those in use have stored the call's tokens and some not."""
    used = [number for number in after if before.get(number) or not any(before.values())]
    gained = {after[number] - before.get(number, 0) for number in used}
    return after if len(gained) > 1 else None
