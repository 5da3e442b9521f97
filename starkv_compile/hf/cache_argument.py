"""The model's argument for its cache: `past_key_values`, or `cache` from transformers 5.24 on."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args, get_type_hints

NAMES = ("past_key_values", "cache")

_LIBRARY = "transformers."


class CacheArgument(NamedTuple):
    """The argument of a forward function for its cache.

    name: its name. place: its number among the positional arguments, without self; None: by
    keyword only. declared: whether the function says that it takes a `Cache` of transformers, by
    its annotation or because it belongs to the library. Older code has tuples under these names.
    """

    name: str
    place: int | None
    declared: bool


def cache_argument(function: Callable[..., Any]) -> CacheArgument | None:
    """Returns the cache argument of a function; None if it has none."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    for name in NAMES:
        for place, parameter in enumerate(parameters):
            if parameter.name == name:
                by_place = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
                declared = _is_declared(function, parameter)
                return CacheArgument(name, place if by_place else None, declared)
    return None


def _is_declared(function: Callable[..., Any], parameter: inspect.Parameter) -> bool:
    from transformers import Cache, cache_utils

    if function.__module__.startswith(_LIBRARY):
        return True
    try:
        annotation = get_type_hints(function).get(parameter.name)
    except Exception:  # a name in an annotation that cannot be resolved
        names = re.findall(r"\w*Cache\b", str(parameter.annotation))
        return any(hasattr(cache_utils, name) for name in names)
    kinds = get_args(annotation) or (annotation,)
    return any(isinstance(kind, type) and issubclass(kind, Cache) for kind in kinds)


@functools.cache
def library_argument() -> str:
    """Returns the name that the installed transformers has for the argument."""
    from transformers import GenerationMixin

    argument = cache_argument(GenerationMixin.prepare_inputs_for_generation)
    return NAMES[0] if argument is None else argument.name


def with_cache(cache: Any) -> dict[str, Any]:
    """Returns keyword arguments that pass `cache` to a model, to `generate` or to an output."""
    return {library_argument(): cache}


def pop_cache(named: dict[str, Any], names: Sequence[str] = NAMES) -> Any:
    """Removes the cache from keyword arguments, under each of `names`. Returns it, or None."""
    return next((c for c in [named.pop(name, None) for name in names] if c is not None), None)
