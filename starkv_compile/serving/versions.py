"""Which versions of vLLM the plugin is for, and checks of what it wraps there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import StarKVError

TESTED = ("0.32",)
"""Minor versions of vLLM whose methods the plugin wraps."""

PLUGIN = "starkv"
"""The plugin's name in the entry-point group `vllm.general_plugins`."""

OPTIONS = "starkv"
"""The key of the plugin's options in vLLM's `additional_config`."""

Method = Callable[..., Any]


def installed() -> str:
    """The version of vLLM, such as "0.32.0"."""
    from vllm import __version__

    return str(__version__)


def version_fault() -> str:
    """Why the plugin is not for the vLLM that is installed; "" if it is."""
    if ".".join(installed().split(".")[:2]) in TESTED:
        return ""
    return f"this is vLLM {installed()}, and the plugin is tested with {' and '.join(TESTED)} only"


def given_options(config: Any) -> dict[str, Any] | None:
    """The plugin's options in a `VllmConfig`; None if there are none."""
    given = config.additional_config
    return given.get(OPTIONS) if isinstance(given, dict) else None


@dataclass(frozen=True)
class Patch:
    """A method to replace.

    Attributes:
        owner: its class.
        name: its name.
        parameters: names of its first parameters, in the tested versions.
        make: returns the new method, for the one that it replaces.
    """

    owner: type
    name: str
    parameters: tuple[str, ...]
    make: Callable[[Method], Method]

    @property
    def is_applied(self) -> bool:
        return getattr(self.owner.__dict__.get(self.name), "wrapped_by_starkv", False)

    @property
    def fault(self) -> str:
        """What is not as in the tested versions; "" if nothing is."""
        if self.is_applied:
            return ""
        method, where = self.owner.__dict__.get(self.name), f"{self.owner.__name__}.{self.name}"
        if not callable(method):
            return f"vLLM {installed()} has no {where}, which the plugin wraps"
        found = tuple(inspect.signature(method).parameters)
        if found[: len(self.parameters)] == self.parameters:
            return ""
        return f"{where} of vLLM {installed()} has other parameters ({', '.join(found)})"

    def apply(self) -> None:
        """Replaces the method, once."""
        if self.is_applied:
            return
        original = self.owner.__dict__[self.name]
        made: Any = functools.wraps(original)(self.make(original))
        made.wrapped_by_starkv = True
        setattr(self.owner, self.name, made)


def refuse_options(why: str) -> None:
    """Makes an engine with the plugin's options stop at its start. Others start as before."""
    from vllm.config import VllmConfig

    def make(original: Method) -> Method:
        def post_init(self: Any) -> None:
            if given_options(self) is not None:
                raise StarKVError(
                    f"additional_config has {OPTIONS!r}, but {why}; install vLLM {TESTED[-1]}.0, "
                    "or leave the option out"
                )
            original(self)

        return post_init

    Patch(VllmConfig, "__post_init__", ("self",), make).apply()
