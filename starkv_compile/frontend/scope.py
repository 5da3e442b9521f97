"""Facts about the call in progress, which a graph cannot see while Dynamo compiles it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from ..passes.base import Cache
from ..reporting import GraphReport, Report

last_graphs: list[GraphReport] = []
"""Reports of graphs compiled outside any attached model, newest last (at most 100)."""


@dataclass(frozen=True)
class CompileScope:
    """The call in progress of an attached model. By default there is no such call.

    report: where graphs are reported; None: in `last_graphs`. cache and layers: see
    `passes.base.Context`. cache is "marked" in calls of a model that takes a cache. layers is how
    many layers the cache of the call compresses; 0: unknown.
    """

    report: Report | None = None
    cache: Cache = "stock"
    layers: int = 0

    def file(self, graph: GraphReport) -> None:
        """Report a graph that was compiled in this scope."""
        if self.report is not None:
            self.report.graphs.append(graph)
        else:
            last_graphs.append(graph)
            del last_graphs[:-100]


_NO_CALL = CompileScope()
_current: ContextVar[CompileScope] = ContextVar("starkv_scope", default=_NO_CALL)


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
