"""Finds the language models inside a module, and the modules around them that take their cache."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torch.jit import ScriptModule

from .cache_argument import CacheArgument, cache_argument, library_argument


class CacheOwner(NamedTuple):
    """A module whose forward takes a Hugging Face cache, and the argument that takes it."""

    module: nn.Module
    argument: CacheArgument


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A decoder, and the modules that hand it a cache.

    Attributes:
        decoder: the module that writes the cache.
        owners: the modules whose forward takes the cache, outermost first. The decoder itself is
            the last one if it takes a cache.
    """

    decoder: nn.Module
    owners: tuple[CacheOwner, ...]


def language_models(model: nn.Module) -> list[LanguageModel]:
    """Returns the language models inside `model`, wherever they sit, `model` itself included.

    A decoder inside another decoder is a part of it.
    """
    owners: dict[nn.Module, list[CacheOwner]] = {}
    for module in model.modules():
        # Most modules end here, before their signature is read. One of TorchScript has none.
        if isinstance(module, ScriptModule) or not hasattr(module, "get_decoder"):
            continue
        argument = cache_argument(type(module).forward) or _by_keyword(module)
        decoder = None if argument is None else find_decoder(module)
        if argument is not None and decoder is not None:
            owners.setdefault(decoder, []).append(CacheOwner(module, argument))
    inside = {part for decoder in owners for part in decoder.modules() if part is not decoder}
    return [
        LanguageModel(decoder, tuple(found))
        for decoder, found in owners.items()
        if decoder not in inside and _decodes([owner.module for owner in found])
    ]


def find_decoder(module: nn.Module) -> nn.Module | None:
    """The module that `get_decoder()` leads to, over several modules; None without that method."""
    found: list[nn.Module] = []
    while callable(find := getattr(module, "get_decoder", None)):
        try:
            inner = find()
        except Exception:  # of a model that has none
            break
        if not isinstance(inner, nn.Module) or inner in found:
            break
        found.append(inner)
        module = inner
    return found[-1] if found else None


def _by_keyword(module: nn.Module) -> CacheArgument | None:
    """The library's argument, if the module generates and hands its further keywords on."""
    from transformers import GenerationMixin

    parameters = inspect.signature(type(module).forward).parameters.values()
    if isinstance(module, GenerationMixin) and any(p.kind is p.VAR_KEYWORD for p in parameters):
        return CacheArgument(library_argument(), None, declared=False)
    return None


def _decodes(owners: list[nn.Module]) -> bool:
    """Whether they generate, or their configuration does not say that they only encode.

    The configuration of BERT says so by default, and transformers has a cache argument there.
    """
    from transformers import GenerationMixin

    generates = any(isinstance(owner, GenerationMixin) for owner in owners)
    return generates or not only_encodes(owners[-1])


def only_encodes(module: nn.Module) -> bool:
    """Whether the configuration of a module says that it decodes nothing."""
    return getattr(getattr(module, "config", None), "is_decoder", True) is False
