"""A `torch.compile` backend that compresses the KV cache of vision-language models.

    torch.compile(model, backend="starkv", options={"budget": 0.2})

Importing this package compiles nothing, patches nothing, and imports neither Triton nor
transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .config import StarKVConfig
from .errors import (
    CacheError,
    MissingPackage,
    NonFiniteScores,
    OptionError,
    PolicyError,
    SessionFileError,
    StarKVError,
    UnsupportedModel,
)
from .lazy import lazy_names
from .reporting import GraphReport, Report

if TYPE_CHECKING:
    from . import export, passes, policies
    from .cache import StarKVCache
    from .frontend import compile, compiled, last_report, report, undo
    from .session import AgentSession

__version__ = "0.1.0"

# What loads torch or transformers waits until it is used.
__getattr__ = lazy_names(
    __name__,
    {
        "compile": "frontend",
        "compiled": "frontend",
        "report": "frontend",
        "last_report": "frontend",
        "undo": "frontend",
        "StarKVCache": "cache",
        "AgentSession": "session",
        "export": "",
        "passes": "",
        "policies": "",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "AgentSession",
    "CacheError",
    "GraphReport",
    "MissingPackage",
    "NonFiniteScores",
    "OptionError",
    "PolicyError",
    "Report",
    "SessionFileError",
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
