"""The models that are compiled with starkv: attaches them, finds them, restores them."""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from ..config import StarKVConfig
from ..errors import OptionError
from ..hf.cache_argument import cache_argument
from ..hf.language_models import LanguageModel, language_models, only_encodes
from ..vision.image_shapes import note_shapes
from .call import Attachment
from .inner import check_inner
from .owner import OwnerCalls
from .stand_in import Compiler, Function, remove_forward, stand_in

_attachments: weakref.WeakKeyDictionary[torch.nn.Module, Attachment] = weakref.WeakKeyDictionary()
"""By the compiled module, and by each module inside it that takes the cache."""


def attach(model: torch.nn.Module, config: StarKVConfig, compiler: Compiler) -> None:
    """Makes `model` run compiled by `compiler`, with a prepared cache.

    Of a module that holds language models, only their decoders are compiled. The rest runs
    eagerly: vision towers split their patches, and Qwen-VL counts its positions, by the values of
    tensors. There Dynamo would break the graph, or fail. The cache is prepared by the outermost
    module that takes it. So it does not matter which of them `generate` calls.

    Raises:
        MissingPackage: the backend `config.inner` is not installed. The model stays as it is.
        OptionError: `shorten_outputs` for a model whose cache counts for itself. The model stays as
            it is.
    """
    check_inner(config.inner)
    found = language_models(model)
    if found and config.shorten_outputs:
        raise OptionError(
            f"shorten_outputs=True: {type(model).__name__} holds a language model with a Hugging "
            "Face cache, which starkv shortens anyway; leave it out"
        )
    before = _attached_with(model)
    detach(model)
    for part in model.modules():
        remove_forward(part)  # of a model that this one is a copy of
    _warn_of_shared(before - set(model.modules()), model)
    attachment = Attachment(config)
    for module in (model, *(owner.module for one in found for owner in one.owners)):
        _attachments[module] = attachment
    for one in found:
        _attach_language_model(one, attachment, compiler)
    if not found:
        attachment.undo.append(
            stand_in(model, attachment.call_plain, compiler, attachment.is_running)
        )
        if not config.shorten_outputs and not config.keeps_everything:
            _warn_of_plain(model, attachment)
    elif model._compiled_call_impl is None:  # it holds them, and takes no cache itself
        attachment.undo.append(stand_in(model, _run, _leave, is_running=lambda: True))


def _attach_language_model(one: LanguageModel, attachment: Attachment, compiler: Compiler) -> None:
    if all(owner.module is not one.decoder for owner in one.owners):
        _compile_inside(one.decoder, attachment, compiler)
    for owner in one.owners:
        calls = OwnerCalls(owner, innermost=owner is one.owners[-1])
        compiles = compiler if owner.module is one.decoder else _leave
        run = functools.partial(attachment.call, calls)
        attachment.undo.append(stand_in(owner.module, run, compiles, attachment.is_running))
        attachment.undo.append(note_shapes(owner.module))


def _leave(function: Function) -> Function:
    return function


def _run(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _compile_inside(decoder: torch.nn.Module, attachment: Attachment, compiler: Compiler) -> None:
    """Makes a decoder that takes no cache run compiled within calls of its owners only."""
    kept = weakref.ref(decoder)

    def run(compiled: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        called = compiled if attachment.is_running() else kept()._call_impl  # type: ignore[union-attr]
        return called(*args, **kwargs)

    attachment.undo.append(stand_in(decoder, run, compiler, is_running=lambda: True))


def _attached_with(model: torch.nn.Module) -> set[torch.nn.Module]:
    """The modules that are attached together with a part of `model`."""
    parts = {_attachments[part] for part in model.modules() if part in _attachments}
    return {module for module, attachment in _attachments.items() if attachment in parts}


def _warn_of_shared(others: set[torch.nn.Module], model: torch.nn.Module) -> None:
    """Says which models around parts of `model` are no longer compiled."""
    if others:
        kinds = " and ".join(sorted({type(other).__name__ for other in others}))
        warnings.warn(
            f"starkv: {kinds} is no longer compiled, because it holds parts of this "
            f"{type(model).__name__}, and a part follows one configuration; compile only one of "
            "them, or give each its own copy",
            stacklevel=4,
        )


def _warn_of_plain(module: torch.nn.Module, attachment: Attachment) -> None:
    kind = type(module).__name__
    if only_encodes(module):
        reason = f"{kind} is an encoder by its configuration (is_decoder=False): it caches nothing"
    elif cache_argument(type(module).forward) is None:
        reason = (
            f"{kind} holds no language model: no module with get_decoder() whose forward takes a "
            "Cache of transformers, which would count the tokens that are dropped. Either write "
            "one, with past_key_values: Cache and cache.update(key, value, layer). Or compile the "
            "module whose forward returns the keys and values with torch.compile(module, "
            'fullgraph=True, options={"shorten_outputs": True}), if the code that calls it counts '
            "positions on from the uncompressed length and makes masks as long as the cache"
        )
    else:
        reason = (
            f"{kind} is a part of a language model, and the cache that it is given counts for all "
            "parts; compile the whole model, or give it a get_decoder() that returns itself if it "
            "is the whole one"
        )
    attachment.report.refusals.append(reason)
    warnings.warn(f"starkv leaves {kind} uncompressed: {reason}", stacklevel=4)


def attached(model: torch.nn.Module) -> Attachment | None:
    """The attachment of `model`, of the module a `torch.compile` wrapper holds, or of one inside.

    A wrapper put around a compiled model later, such as PEFT's, holds it inside.
    """
    model = getattr(model, "_orig_mod", model)
    return next((_attachments[m] for m in model.modules() if m in _attachments), None)


@contextlib.contextmanager
def set_aside(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Takes away whatever `model` is compiled with, and puts the same objects back at the end.

    Yields the model itself, which `model` may be a `torch.compile` wrapper of.
    """
    model = getattr(model, "_orig_mod", model)
    attachments = {m: _attachments.pop(m) for m in model.modules() if m in _attachments}
    found = language_models(model)
    owners = {owner.module for one in found for owner in one.owners}
    modules = {model, *attachments, *owners, *(one.decoder for one in found)}
    before = {m: (m._compiled_call_impl, vars(m).get("forward")) for m in modules}
    for module in modules:
        module._compiled_call_impl = None
        remove_forward(module)
    try:
        yield model
    finally:
        detach(model)
        for module, (call, forward) in before.items():
            module._compiled_call_impl = call
            if forward is not None and "forward" not in vars(module):
                module.forward = forward
        _attachments.update(attachments)


def detach(model: torch.nn.Module) -> bool:
    """Restores the model and all models inside. Returns whether one of them was attached."""
    found = False
    while (attachment := attached(model)) is not None:
        found = True
        for step in reversed(attachment.undo):
            step()
        for module in [m for m, other in _attachments.items() if other is attachment]:
            del _attachments[module]
    return found
