"""Facts about the call in progress, which a graph cannot see while Dynamo compiles it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ..cache.cache import StarKVCache
from ..passes.base import Cache
from ..reporting import GraphReport, Report

last_graphs: list[GraphReport] = []
"""Reports of graphs compiled outside any attached model, newest last (at most 100)."""

NO_CALL = (
    "the graph was not compiled in a call of a model that starkv was given, so nobody is known to "
    "count the tokens of a shorter cache. Compile the language model itself, with "
    "starkv_compile.compile(model). If your own code counts positions on from the uncompressed "
    "length and makes masks as long as the cache, use torch.compile(..., fullgraph=True, "
    'options={"shorten_outputs": True})'
)
"""Why the keys and values of a function or of a part of a model stay uncompressed."""


@dataclass(frozen=True)
class CompileScope:
    """The call in progress of an attached model. By default there is no such call.

    report: where graphs are reported; None: in `last_graphs`. cache, layers and unmarked: see
    `passes.base.Context`. held: the cache that the modules inside get. left_alone: whether the call
    stays uncompressed, with the calls inside it that it gives no other `StarKVCache`.
    """

    report: Report | None = None
    cache: Cache = "nobody"
    layers: int = 0
    unmarked: str = NO_CALL
    held: Any = None
    left_alone: bool = False

    def covers(self, report: Report, cache: Any) -> bool:
        """Whether a call inside this one, of the model with this report, is prepared already."""
        if self.report is not report:
            return False
        if self.left_alone and not isinstance(cache, StarKVCache):
            return True
        return cache is not None and cache is self.held

    def file(self, graph: GraphReport) -> None:
        """Report a graph that was compiled in this scope."""
        if self.report is not None:
            self.report.graphs.append(graph)
        else:
            last_graphs.append(graph)
            del last_graphs[:-100]


_OUTSIDE = CompileScope()
_current: ContextVar[CompileScope] = ContextVar("starkv_scope", default=_OUTSIDE)


def current_scope() -> CompileScope:
    return _current.get()


@contextlib.contextmanager
def entered(scope: CompileScope) -> Iterator[None]:
    """Graphs compiled inside are compiled in `scope`."""
    token = _current.set(scope)
    try:
        yield
    finally:
        _current.reset(token)
