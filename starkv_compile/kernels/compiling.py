"""What holds while a graph with `torch.ops.starkv` in it is compiled to run in this process."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch.compiler import config

_own_kernels: ContextVar[bool] = ContextVar("own_kernels", default=False)


_recorded: dict[str, bytes] = {}
"""What ops defined outside this folder are made of, by the name of the op."""


def record_source(name: str, function: Callable[..., Any]) -> None:
    """Let compiled graphs depend on the source of an op's body, its whole file where it has one."""
    source = inspect.getsourcefile(function)
    if source is not None and Path(source).is_file():
        _recorded[name] = Path(source).read_bytes()
    else:  # typed in at a prompt
        _recorded[name] = function.__code__.co_code + repr(function.__code__.co_consts).encode()
    source_fingerprint.cache_clear()


@functools.cache
def source_fingerprint() -> str:
    """Changes with any source file of the kernels, and with what recorded ops are made of."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.cpp")]):
        digest.update(path.read_bytes())
    for name in sorted(_recorded):
        digest.update(name.encode() + _recorded[name])
    return digest.hexdigest()[:16]


@contextmanager
def _compiling(kind: str) -> Iterator[None]:
    """Cached under the ops' source and `kind`.

    Inductor's cache key names the ops of a graph, not what they are made of: after an upgrade of
    this package it would go on running the compiled code of the version before.
    """
    tag = f"{config.cache_key_tag}starkv-{kind}-{source_fingerprint()}"
    token = _own_kernels.set(kind == "in-process")
    try:
        with config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            yield
    finally:
        _own_kernels.reset(token)


def in_process() -> AbstractContextManager[None]:
    """For whoever compiles a graph with our ops for this process; the backend does so itself.

    On a CPU such a graph calls the C++ kernels where there are any.
    """
    return _compiling("in-process")


def portable() -> AbstractContextManager[None]:
    """For a graph that is to leave the process, exported or packaged.

    On a CPU it consists of torch's own operations and needs nothing of ours.
    """
    return _compiling("portable")


def runs_cpp() -> bool:
    """Whether a graph being compiled may call C++ kernels on a CPU.

    On Linux, where Inductor's compiler is GCC or Clang, whose vectors they are written in.
    """
    return _own_kernels.get() and sys.platform == "linux"
