"""Which versions of vLLM the plugin is for, and checks of what it wraps there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ..errors import StarKVError

TESTED = ("0.32",)
"""Minor versions of vLLM whose methods the plugin wraps."""

OPTIONS = "starkv"
"""The key of the plugin's options in vLLM's `additional_config`."""


def installed() -> str:
    """The version of vLLM, such as "0.32.0"."""
    from vllm import __version__

    return str(__version__)


def is_supported() -> bool:
    return ".".join(installed().split(".")[:2]) in TESTED


def refuse_options() -> None:
    """Makes an engine of another version refuse the plugin's options. Without them, it starts."""
    from vllm.config import VllmConfig

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def post_init(self: Any) -> None:
            if given_options(self) is not None:
                raise StarKVError(
                    f"additional_config has {OPTIONS!r}, but this is vLLM {installed()}, and the "
                    f"plugin is tested with {' and '.join(TESTED)} only; install one of these, or "
                    "leave the option out"
                )
            original(self)

        return post_init

    wrap(VllmConfig, "__post_init__", ("self",), make)


def given_options(config: Any) -> dict[str, Any] | None:
    """The plugin's options in a `VllmConfig`; None if there are none."""
    given = config.additional_config
    return given.get(OPTIONS) if isinstance(given, dict) else None


def wrap(
    owner: type,
    name: str,
    parameters: tuple[str, ...],
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    """Replaces a method by `make(method)`, once.

    Args:
        owner: the class.
        name: the method.
        parameters: names of its first parameters, in the tested versions.
        make: returns the new method.

    Raises:
        StarKVError: the method is missing, or has other parameters.
    """
    original = owner.__dict__.get(name)
    if getattr(original, "wrapped_by_starkv", False):
        return
    if not callable(original):
        raise StarKVError(_changed(owner, name, "it does not exist"))
    found = tuple(inspect.signature(original).parameters)
    if found[: len(parameters)] != parameters:
        raise StarKVError(_changed(owner, name, f"its parameters are {', '.join(found)}"))
    made: Any = functools.wraps(original)(make(original))
    made.wrapped_by_starkv = True
    setattr(owner, name, made)


def _changed(owner: type, name: str, how: str) -> str:
    return (
        f"vLLM {installed()}: {owner.__name__}.{name} is not the method that starkv was tested "
        f"with ({how}); install vLLM {TESTED[-1]}.0, or uninstall the plugin"
    )
