"""The models that are compiled with starkv: attaches them, finds them, restores them."""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..config import StarKVConfig
from ..errors import OptionError
from ..hf.cache_argument import cache_argument
from ..hf.language_models import LanguageModel, language_models
from ..vision.image_shapes import note_shapes
from .call import Attachment
from .inner import check_inner
from .owner import OwnerCalls
from .scope import current_scope

Function = Callable[..., Any]
Compiler = Callable[[Function], Function]

_attachments: weakref.WeakKeyDictionary[torch.nn.Module, Attachment] = weakref.WeakKeyDictionary()
"""By the compiled module, and by each module inside it that takes the cache."""


_forwards: weakref.WeakSet[Function] = weakref.WeakSet()
"""The functions that stand in for the `forward` of attached modules."""


def attach_compiled(
    model: torch.nn.Module, config: StarKVConfig, call: Function, compiler: Compiler
) -> Function:
    """Returns `call`, a bound method of `model`, compiled by `compiler`, with a prepared cache.

    Of a module that holds language models, only their decoders are compiled. The rest runs
    eagerly: vision towers split their patches, and Qwen-VL counts its positions, by the values of
    tensors. There Dynamo would break the graph, or fail. The cache is prepared by the outermost
    module that takes it. So it does not matter which of them `generate` calls.

    Raises:
        MissingPackage: the backend `config.inner` is not installed.
        OptionError: `shorten_outputs` for a model whose cache counts for itself.
        All of them leave the model as it is.
    """
    check_inner(config.inner)
    found = language_models(model)
    if found and config.shorten_outputs:
        raise OptionError(
            f"shorten_outputs=True: {type(model).__name__} holds a language model with a Hugging "
            "Face cache, which starkv shortens anyway; leave it out"
        )
    owned = [owner.module for one in found for owner in one.owners]
    while detach(model):
        pass
    attachment = Attachment(config)
    for module in [model, *owned]:
        _attachments[module] = attachment
    if not found:
        if not config.shorten_outputs and not config.keeps_everything:
            _warn_of_plain(model, attachment)
        return _attach_plain(model, attachment, call, compiler)
    for one in found:
        _attach_language_model(one, attachment, compiler)
    if model in owned:
        return model._compiled_call_impl  # type: ignore[return-value]
    attachment.undo.append(_restore(model))
    return forwarding(call)


def forwarding(method: Function) -> Function:
    """A function that calls a bound method. Dynamo sets attributes on what `compile` returns."""

    @functools.wraps(method)
    def function(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return function


def _attach_plain(
    module: torch.nn.Module, attachment: Attachment, call: Function, compiler: Compiler
) -> Function:
    """Compiles a module without a language model as a whole, however it is called."""
    compiled = compiler(call)

    @functools.wraps(call)
    @_outside_graphs
    def attached_call(*args: Any, **kwargs: Any) -> Any:
        return attachment.call_plain(compiled, args, kwargs)

    _replace(module, attachment, attached_call, attachment.call_plain, compiler)
    return attached_call


def _attach_language_model(one: LanguageModel, attachment: Attachment, compiler: Compiler) -> None:
    owners = {owner.module: owner for owner in one.owners}
    innermost = one.owners[-1].module
    if one.decoder not in owners:
        _compile_inside(one.decoder, attachment, compiler)
    for module, owner in owners.items():
        calls = OwnerCalls(owner, innermost=module is innermost)
        compiles = compiler if module is one.decoder else _leave
        inner = compiles(module._call_impl)
        run = functools.partial(attachment.call, calls)
        _replace(module, attachment, _attached(module, run, inner), run, compiles)
        attachment.undo.append(note_shapes(module))


def _leave(function: Function) -> Function:
    return function


def _attached(module: torch.nn.Module, run: Function, inner: Function) -> Function:
    @functools.wraps(module._call_impl)
    @_outside_graphs
    def attached_call(*args: Any, **kwargs: Any) -> Any:
        return run(inner, args, kwargs)

    return attached_call


def _outside_graphs(function: Function) -> Function:
    """A function that a graph around it does not trace. What it calls may be compiled."""
    return torch._dynamo.disable(function)


def _replace(
    module: torch.nn.Module,
    attachment: Attachment,
    call: Function,
    run: Function,
    compiler: Compiler,
) -> None:
    """Makes `module(...)` run `call`, and `module.forward(...)` the same, without hooks."""
    module._compiled_call_impl = call
    if "forward" not in vars(module):  # else somebody replaced it, and calls this one
        module.forward = types.MethodType(_direct(module, run, compiler), module)
    attachment.undo.append(_restore(module))


def _restore(module: torch.nn.Module) -> Callable[[], None]:
    """Returns a function that undoes what was set on `module`, without keeping it alive."""
    kept = weakref.ref(module)

    def undo() -> None:
        module = kept()
        if module is not None:
            module._compiled_call_impl = None
            _restore_forward(module)

    return undo


def _restore_forward(module: torch.nn.Module) -> None:
    """Removes the `forward` of an attached module, unless somebody put a function around it."""
    if getattr(vars(module).get("forward"), "__func__", None) in _forwards:
        del module.forward


def _direct(module: torch.nn.Module, run: Function, compiler: Compiler) -> Function:
    """The `forward` of an attached module, for code that calls it in place of the module."""
    plain, kept = type(module).forward, weakref.ref(module)

    @functools.cache
    def compiled(module: torch.nn.Module) -> Function:
        return compiler(types.MethodType(plain, module))

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the module's own call arrives here
            return plain(self, *args, **kwargs)
        if self not in _attachments:
            if self is not kept():
                _warn_of_copy(self)
            return plain(self, *args, **kwargs)
        return run(compiled(self), args, kwargs)

    _forwards.add(forward)
    return forward


def _compile_inside(decoder: torch.nn.Module, attachment: Attachment, compiler: Compiler) -> None:
    """Makes a decoder that takes no cache run compiled within calls of its owners only."""
    compiled, report = compiler(decoder._call_impl), attachment.report
    kept = weakref.ref(decoder)  # else the function it holds would keep it alive

    @_outside_graphs
    def call(*args: Any, **kwargs: Any) -> Any:
        if current_scope().report is report:
            return compiled(*args, **kwargs)
        return kept()._call_impl(*args, **kwargs)  # type: ignore[union-attr]

    decoder._compiled_call_impl = call
    attachment.undo.append(_restore(decoder))


def _warn_of_plain(module: torch.nn.Module, attachment: Attachment) -> None:
    kind = type(module).__name__
    if cache_argument(type(module).forward) is None:
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
    warnings.warn(f"starkv leaves {kind} uncompressed: {reason}", stacklevel=5)


def _warn_of_copy(module: torch.nn.Module) -> None:
    kind = type(module).__name__
    for part in module.modules():
        _restore_forward(part)
    warnings.warn(
        f"starkv: this {kind} is a copy of a compiled model, and is not compiled itself; call "
        "starkv_compile.compile on the copy",
        stacklevel=6,
    )


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
    before = [
        (module, module._compiled_call_impl, vars(module).get("forward"))
        for module in model.modules()
    ]
    attachments = {m: _attachments.pop(m) for m, _, _ in before if m in _attachments}
    for module, call, _ in before:
        if call is not None:
            module._compiled_call_impl = None
        if module in attachments:
            vars(module).pop("forward", None)
    try:
        yield model
    finally:
        detach(model)
        for module, call, forward in before:
            if call is not None:
                module._compiled_call_impl = call
            if module in attachments and forward is not None:
                module.forward = forward
        _attachments.update(attachments)


def detach(model: torch.nn.Module) -> bool:
    """Restores the model. Returns whether it was attached."""
    attachment = attached(model)
    if attachment is None:
        return False
    for step in reversed(attachment.undo):
        step()
    for module in [m for m, other in _attachments.items() if other is attachment]:
        del _attachments[module]
    return True
