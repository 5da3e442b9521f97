"""A `torch.compile` backend that compresses the KV cache of vision-language models.

    torch.compile(model, backend="starkv", options={"budget": 0.2})

Importing this package compiles nothing, patches nothing, and imports neither Triton nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import StarKVConfig
from .errors import (
    CacheError,
    MissingPackage,
    NonFiniteScores,
    OptionError,
    StarKVError,
    UnsupportedModel,
)
from .reporting import GraphReport, Report

if TYPE_CHECKING:
    from . import export, passes, policies
    from .cache import StarKVCache
    from .frontend import compile, compiled, last_report, report, undo
    from .session import AgentSession

__version__ = "0.1.0"

_HOMES = {
    "compile": "frontend",
    "compiled": "frontend",
    "report": "frontend",
    "last_report": "frontend",
    "undo": "frontend",
    "StarKVCache": "cache",
    "AgentSession": "session",
}
"""Which module has a name that is imported when it is first used: these load transformers."""

_MODULES = ("export", "passes", "policies")


def __getattr__(name: str) -> Any:
    if name in _MODULES:  # `starkv_compile.passes.apply`, without an import of its own
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "AgentSession",
    "CacheError",
    "GraphReport",
    "MissingPackage",
    "NonFiniteScores",
    "OptionError",
    "Report",
    "StarKVCache",
    "StarKVConfig",
    "StarKVError",
    "UnsupportedModel",
    "compile",
    "compiled",
    "export",
    "last_report",
    "passes",
    "policies",
    "report",
    "undo",
]
