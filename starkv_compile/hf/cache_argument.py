"""The model's argument for its cache: `past_key_values`, or `cache` from transformers 5.24 on."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

NAMES = ("past_key_values", "cache")


def cache_argument(function: Callable[..., Any]) -> str | None:
    """Returns the name of the argument in `function`; None if it takes no cache."""
    parameters = inspect.signature(function).parameters
    return next((name for name in NAMES if name in parameters), None)


@functools.cache
def _in_the_library() -> str:
    from transformers import GenerationMixin

    return cache_argument(GenerationMixin.prepare_inputs_for_generation) or NAMES[0]


def own_cache_argument() -> str:
    """Returns how a caller passes a `StarKVCache`, for error messages."""
    return f"{_in_the_library()}=starkv_compile.StarKVCache(model.config)"


def with_cache(cache: Any) -> dict[str, Any]:
    """Returns keyword arguments that pass `cache` to a model, to `generate` or to an output."""
    return {_in_the_library(): cache}


def pop_cache(named: dict[str, Any]) -> Any:
    """Removes the cache from keyword arguments, under either name. Returns it, or None."""
    return next((c for c in [named.pop(name, None) for name in NAMES] if c is not None), None)
