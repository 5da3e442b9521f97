"""The models that are compiled with starkv: attaches them, finds them, restores them."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..cache.interruption import whole_call
from ..config import StarKVConfig
from .call import Attachment
from .inner import check_inner
from .scope import current_scope

Function = Callable[..., Any]
Compiler = Callable[[Function], Function]

_attachments: weakref.WeakKeyDictionary[torch.nn.Module, Attachment] = weakref.WeakKeyDictionary()


def attach(model: torch.nn.Module, config: StarKVConfig) -> Attachment:
    """Register `model`, replacing what was attached before."""
    detach(model)
    attachment = Attachment(model, config)
    _attachments[model] = attachment
    return attachment


def attach_compiled(
    model: torch.nn.Module, config: StarKVConfig, call: Function, compiler: Compiler
) -> Function:
    """Returns `call`, a bound method of `model`, compiled by `compiler`, with a prepared cache.

    If the model contains a language model, only that is compiled. The rest runs eagerly: vision
    towers split their patches, and Qwen-VL counts its positions, by the values of tensors. There
    Dynamo would break the graph, or fail.

    Raises:
        MissingPackage: the backend `config.inner` is not installed. The model stays as it is.
    """
    check_inner(config.inner)
    attachment = attach(model, config)
    decoder = find_decoder(model)
    if decoder is None or decoder is model:
        inner = compiler(call)
    else:
        inner = call
        attachment.undo.append(_compile_inside(decoder, attachment, compiler))

    @functools.wraps(call)
    def attached_call(*args: Any, **kwargs: Any) -> Any:
        with whole_call(args, kwargs):
            return attachment.call(inner, args, kwargs)

    return attached_call


def _compile_inside(
    decoder: torch.nn.Module, attachment: Attachment, compiler: Compiler
) -> Callable[[], None]:
    """Makes `decoder` run compiled within calls of the attached model only; returns undo."""
    compiled, report = compiler(decoder._call_impl), attachment.report
    kept = weakref.ref(decoder)  # else the function it holds would keep it alive

    def call(*args: Any, **kwargs: Any) -> Any:
        if current_scope().report is report:
            return compiled(*args, **kwargs)
        return kept()._call_impl(*args, **kwargs)  # type: ignore[union-attr]

    decoder._compiled_call_impl = call

    def undo() -> None:
        kept()._compiled_call_impl = None  # type: ignore[union-attr]

    return undo


def find_decoder(model: torch.nn.Module) -> torch.nn.Module | None:
    """The language model that writes the cache, or None if the model does not name it."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if find is not None else None
    return decoder if isinstance(decoder, torch.nn.Module) else None


def attached(model: torch.nn.Module) -> Attachment | None:
    """The attachment of `model` or of the module a `torch.compile` wrapper holds."""
    return _attachments.get(getattr(model, "_orig_mod", model))


@contextlib.contextmanager
def set_aside(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Takes away whatever `model` is compiled with, and puts the same objects back at the end.

    Yields the model itself, which `model` may be a `torch.compile` wrapper of.
    """
    model = getattr(model, "_orig_mod", model)
    decoder = find_decoder(model)
    modules = [model] if decoder is None or decoder is model else [model, decoder]
    calls = [module._compiled_call_impl for module in modules]
    attachment = _attachments.pop(model, None)
    for module in modules:
        module._compiled_call_impl = None
    try:
        yield model
    finally:
        detach(model)
        for module, call in zip(modules, calls, strict=True):
            module._compiled_call_impl = call
        if attachment is not None:
            _attachments[model] = attachment


def detach(model: torch.nn.Module) -> bool:
    """Restores the model. Returns whether it was attached."""
    model = getattr(model, "_orig_mod", model)
    attachment = _attachments.pop(model, None)
    if attachment is None:
        return False
    for step in reversed(attachment.undo):
        step()
    model._compiled_call_impl = None  # not one of the steps: those would keep the model alive
    return True
