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


def stand_in(
    module: torch.nn.Module, run: Function, compiler: Compiler, is_running: Callable[[], bool]
) -> Callable[[], None]:
    """Makes `module(...)` and `module.forward(...)` run `run(compiled, args, kwargs)`.

    Args:
        module: the module.
        run: gets the module's own function, compiled, and the arguments of a call.
        compiler: compiles a bound method of the module.
        is_running: whether `run` is running. A graph that is traced meanwhile contains `forward`.
            One that somebody else compiles breaks there, so that `run` runs.

    Returns:
        A function that undoes this, and does not keep the module alive.
    """
    remove_forward(module)
    kept, undone = weakref.ref(module), False
    own = vars(module).get("forward")  # somebody's function around the module's own
    whole, compiled = module._call_impl, functools.cache(compiler)

    @functools.wraps(whole)
    @outside_graphs
    def call(*args: Any, **kwargs: Any) -> Any:
        if undone:  # a wrapper of `torch.compile` still holds this function
            return whole(*args, **kwargs)
        return run(compiled(whole), args, kwargs)

    @functools.wraps(type(module).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if is_foreign():
                return outside(self, *args, **kwargs)
            if own is not None:
                return own(*args, **kwargs)
            # Not `type(self)`: Dynamo could not store what it then has to check (precompilation).
            return self.__class__.forward(self, *args, **kwargs)
        plain = types.MethodType(type(self).forward, self) if own is None else own
        if self is not kept():
            _warn_of_copy(self)
        elif not undone:
            return run(compiled(plain), args, kwargs)
        return plain(*args, **kwargs)

    @torch._dynamo.assume_constant_result
    def is_foreign() -> bool:
        return not (undone or torch.compiler.is_exporting() or is_running())

    outside = outside_graphs(forward)

    def undo() -> None:
        nonlocal undone
        undone, module = True, kept()
        if module is None:
            return
        module._compiled_call_impl = None
        remove_forward(module)
        if own is not None and "forward" not in vars(module):
            module.forward = own

    _forwards.add(forward)
    module._compiled_call_impl = call
    module.forward = types.MethodType(forward, module)
    return undo


def remove_forward(module: torch.nn.Module) -> None:
    """Removes a `forward` that stands in, also one that was copied or unpickled with the module.

    It stays if somebody put a function around it.
    """
    function = getattr(vars(module).get("forward"), "__func__", None)
    if function is not None and (function in _forwards or function is type(module).forward):
        del module.forward


def outside_graphs(function: Function) -> Function:
    """A function that a graph around it does not trace. What it calls may be compiled."""
    return torch._dynamo.disable(function)


def forwarding(method: Function) -> Function:
    """A function that calls a bound method. Unlike that, it can have attributes."""

    @functools.wraps(method)
    def function(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return function


def _warn_of_copy(module: torch.nn.Module) -> None:
    """Says that a copy is not compiled. Its methods are those of the model that was copied."""
    for part in module.modules():
        remove_forward(part)
    warnings.warn(
        f"starkv: this {type(module).__name__} is a copy of a compiled model, and is not compiled "
        "itself; call starkv_compile.compile on the copy",
        stacklevel=6,
    )
