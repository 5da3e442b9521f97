"""A module whose forward takes a cache: reads the cache from a call, and puts one into it."""

from __future__ import annotations

import inspect
import types
import weakref
from typing import Any

import torch

from ..hf.cache_argument import NAMES, CacheArgument, cache_argument, pop_cache
from ..hf.language_models import CacheOwner


class OwnerCalls:
    """Reads and changes the arguments of calls of one cache owner.

    Attributes:
        name: the name of the argument.
        declared: as in `hf.cache_argument.CacheArgument`.
        innermost: whether no module inside it takes the cache as well.
    """

    def __init__(self, owner: CacheOwner, innermost: bool) -> None:
        self._module = weakref.ref(owner.module)
        function, argument = _function_of(owner)
        self.name, self._place = argument.name, argument.place
        self.declared, self.innermost = argument.declared, innermost
        self._signature = inspect.signature(function)
        kinds = {p.kind: p.name for p in self._signature.parameters.values()}
        self._rest = kinds.get(inspect.Parameter.VAR_KEYWORD, "")
        # The library takes its cache under its other name too, unless that is another argument.
        other = [n for n in NAMES if n != self.name and not self.takes(n)]
        self._names = [self.name, *other]

    @property
    def module(self) -> torch.nn.Module | None:
        return self._module()

    def cache_in(self, args: Any, kwargs: Any) -> Any:
        """The cache of a call, or None."""
        given = pop_cache(dict(kwargs), self._names)
        if given is None and self._place is not None and self._place < len(args):
            return args[self._place]
        return given

    def named(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """All arguments of a call, with their names as keys; the cache as `past_key_values`."""
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        rest = bound.pop(self._rest, {})
        named = {**bound, **rest}
        given = pop_cache(named, self._names)
        return {**named, "past_key_values": given}

    def handing(self, cache: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """The arguments of a call without a cache, with `cache` among them."""
        kwargs = dict(kwargs)
        pop_cache(kwargs, self._names)
        return self.replacing(self.name, cache, args, kwargs)

    def takes(self, name: str) -> bool:
        return name in self._signature.parameters

    def replacing(
        self, name: str, value: Any, args: Any, kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The arguments of a call with `value` for one of them, wherever it stands."""
        names = list(self._signature.parameters)
        place = names.index(name) if name in names else len(args)
        if place < len(args):
            return (*args[:place], value, *args[place + 1 :]), kwargs
        return args, {**kwargs, name: value}


def _function_of(owner: CacheOwner) -> tuple[Any, CacheArgument]:
    """The forward that a call reaches, as a bound method, and its argument for the cache.

    That is what somebody put in its place on this module, as kernels for training do. A function
    around it that takes anything, as an accelerator's hook, says nothing about its arguments.
    """
    module = owner.module
    own: Any = vars(module).get("forward")
    parameters = () if own is None else inspect.signature(own).parameters.values()
    if all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return types.MethodType(type(module).forward, module), owner.argument
    argument = cache_argument(own)
    if argument is None:
        return own, owner.argument._replace(declared=False)
    return own, argument._replace(declared=argument.declared or owner.argument.declared)
