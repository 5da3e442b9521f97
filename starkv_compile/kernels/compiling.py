"""What holds while a graph with `torch.ops.starkv` in it is compiled to run in this process."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path

from torch.compiler import config

_own_kernels: ContextVar[bool] = ContextVar("own_kernels", default=False)


@functools.cache
def source_fingerprint() -> str:
    """Changes with any source file of the kernels and of the policies, some of which add ops."""
    folder = Path(__file__).parent
    policies = folder.parent / "policies"
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.cpp"), *policies.glob("*.py")]):
        digest.update(path.read_bytes())
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
