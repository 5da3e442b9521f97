"""Settings for the compilation of graphs that contain `torch.ops.starkv`."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from types import CodeType
from typing import Any

from torch.compiler import config

_own_kernels: ContextVar[bool] = ContextVar("own_kernels", default=False)


_recorded: dict[str, bytes] = {}
"""Source of ops defined outside this folder, with the name of the op as key."""


def record_source(name: str, function: Callable[..., Any]) -> None:
    """Makes compiled graphs depend on the source of an op's body: on its file, if it has one."""
    source = inspect.getsourcefile(function)
    if source is not None and Path(source).is_file():
        _recorded[name] = Path(source).read_bytes()
    else:  # typed in at a prompt
        _recorded[name] = _code(function.__code__)
    source_fingerprint.cache_clear()


def _code(code: CodeType) -> bytes:
    """What a function does, the same in every process: nested functions print an address."""
    parts = [_code(c) if isinstance(c, CodeType) else repr(c).encode() for c in code.co_consts]
    return code.co_code + repr(code.co_names).encode() + b"".join(parts)


@functools.cache
def source_fingerprint() -> str:
    """A digest that changes with any source file of the kernels and of recorded ops."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for kind in ("py", "cpp", "h") for path in folder.rglob(f"*.{kind}")):
        digest.update(path.read_bytes())
    for name in sorted(_recorded):
        digest.update(name.encode() + _recorded[name])
    return digest.hexdigest()[:16]


@contextmanager
def _compiling(kind: str) -> Iterator[None]:
    """Caches compiled graphs under the ops' source and `kind`.

    Inductor's cache key contains the names of a graph's ops, but not their source. After an upgrade
    of this package, it would still run the compiled code of the earlier version.
    """
    tag = f"{config.cache_key_tag}starkv-{kind}-{source_fingerprint()}"
    token = _own_kernels.set(kind == "in-process")
    try:
        with config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
            yield
    finally:
        _own_kernels.reset(token)


def no_new_guards(shape_env: Any) -> AbstractContextManager[None]:
    """Inside, decisions about symbolic lengths become no conditions on them.

    shape_env: torch's environment of the lengths, or None.
    """
    return nullcontext() if shape_env is None else shape_env.suppress_guards()


def in_process() -> AbstractContextManager[None]:
    """Compile a graph with ops of starkv inside this context if this process runs it.

    The backend does so itself. On a CPU such a graph calls the C++ kernels.
    """
    return _compiling("in-process")


def portable() -> AbstractContextManager[None]:
    """Compile a graph inside this context if it leaves the process, exported or packaged.

    On a CPU it consists of torch's own operations and does not need this package.
    """
    return _compiling("portable")


def runs_cpp() -> bool:
    """Whether a graph being compiled may call C++ kernels on a CPU.

    That is so on Linux, where Inductor's compiler is GCC or Clang: the kernels use their vectors.
    """
    return _own_kernels.get() and sys.platform == "linux"
