"""What runs in place of a module's call and of its `forward`."""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]
Compiler = Callable[[Function], Function]

_forwards: weakref.WeakSet[Function] = weakref.WeakSet()
"""The functions that stand in for the `forward` of modules."""


def stand_in(module: torch.nn.Module, run: Function, compiler: Compiler) -> Callable[[], None]:
    """Makes `module(...)` and `module.forward(...)` run `run(compiled, args, kwargs)`.

    Args:
        module: the module.
        run: gets the module's own function, compiled, and the arguments of a call.
        compiler: compiles a bound method of the module.

    Returns:
        A function that undoes this, and does not keep the module alive.
    """
    compiled = compiler(module._call_impl)

    @functools.wraps(module._call_impl)
    @outside_graphs
    def call(*args: Any, **kwargs: Any) -> Any:
        return run(compiled, args, kwargs)

    module._compiled_call_impl = call
    if "forward" not in vars(module):  # else somebody put a function around it
        module.forward = types.MethodType(_forward(module, run, compiler), module)
    return undo_of(module)


def undo_of(module: torch.nn.Module) -> Callable[[], None]:
    """Returns a function that makes `module` run its own call and `forward` again."""
    kept = weakref.ref(module)

    def undo() -> None:
        module = kept()
        if module is not None:
            module._compiled_call_impl = None
            _restore_forward(module)

    return undo


def outside_graphs(function: Function) -> Function:
    """A function that a graph around it does not trace. What it calls may be compiled."""
    return torch._dynamo.disable(function)


def forwarding(method: Function) -> Function:
    """A function that calls a bound method. Unlike that, it can have attributes."""

    @functools.wraps(method)
    def function(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return function


def _forward(module: torch.nn.Module, run: Function, compiler: Compiler) -> Function:
    """The `forward` of `module`, for code that calls it in place of the module."""
    plain, kept = type(module).forward, weakref.ref(module)
    compiled = functools.cache(compiler)

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the module's own call arrives here
            return plain(self, *args, **kwargs)
        if self is not kept():
            _warn_of_copy(self)
        if self._compiled_call_impl is None:  # undone, but somebody put a function around it
            return plain(self, *args, **kwargs)
        return run(compiled(types.MethodType(plain, self)), args, kwargs)

    _forwards.add(forward)
    return forward


def _restore_forward(module: torch.nn.Module) -> None:
    """Removes the `forward` that stands in, unless somebody put a function around it."""
    if getattr(vars(module).get("forward"), "__func__", None) in _forwards:
        del module.forward


def _warn_of_copy(module: torch.nn.Module) -> None:
    """Says that a copy is not compiled. Its methods are those of the model that was copied."""
    for part in module.modules():
        _restore_forward(part)
    warnings.warn(
        f"starkv: this {type(module).__name__} is a copy of a compiled model, and is not compiled "
        "itself; call starkv_compile.compile on the copy",
        stacklevel=6,
    )
