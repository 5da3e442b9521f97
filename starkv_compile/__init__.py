"""starkv-compile: STaR-KV's importance scores and a KV-cache compaction, put into the graph.

    torch.compile(model, backend="starkv", options={"budget": 0.2})

Method: arXiv 2606.01790. Importing this package compiles nothing, patches nothing, and imports
neither Triton nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import StarKVConfig
from .errors import (
    CacheError,
    NonFiniteScores,
    OptionError,
    StarKVError,
    UnsupportedModel,
)
from .reporting import GraphReport, Report

if TYPE_CHECKING:
    from .api import compile, last_report, report, undo
    from .cache import StarKVCache
    from .session import AgentSession

__version__ = "0.1.0"

_LAZY = {
    "compile": "api",
    "report": "api",
    "last_report": "api",
    "undo": "api",
    "StarKVCache": "cache",
    "AgentSession": "session",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "passes":  # `starkv_compile.passes.apply`, without an import of its own
        return import_module(".passes", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "passes"})


__all__ = [
    "AgentSession",
    "CacheError",
    "GraphReport",
    "NonFiniteScores",
    "OptionError",
    "Report",
    "StarKVCache",
    "StarKVConfig",
    "StarKVError",
    "UnsupportedModel",
    "compile",
    "last_report",
    "report",
    "undo",
]
