"""The backend: rewrite Dynamo's graph, then let the inner backend compile it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from torch.fx import GraphModule

from ..config import StarKVConfig
from ..errors import OptionError, StarKVError
from ..passes import Pipeline
from ..passes.base import Cache
from ..reporting import GraphReport, Report
from .inner import compile_inner

current_report: ContextVar[Report | None] = ContextVar("current_report", default=None)
"""Where graphs compiled right now are reported to; set around calls of an attached model."""

current_cache: ContextVar[Cache] = ContextVar("current_cache", default="stock")
"""See `passes.base.Context`; "marked" around calls of an attached model that takes a cache."""

current_layers: ContextVar[int] = ContextVar("current_layers", default=0)
"""The same: how many layers the cache of that call compresses; 0 where nobody knows."""

last_graphs: list[GraphReport] = []
"""Reports of graphs compiled outside any attached model, newest last (at most 100)."""


def starkv_backend(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Backend of `torch.compile(model, backend="starkv", options={...})`.

    Args:
        module: the graph Dynamo captured.
        example_inputs: its inputs, fake.
        options: `StarKVConfig` values; an unknown or impossible one raises `OptionError`.
        mode: Inductor's mode, as in `torch.compile`.
    """
    return _compile(module, example_inputs, Pipeline(StarKVConfig.from_options(options)), mode)


def decoder_backend(
    module: GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any]
) -> Callable[..., Any]:
    """The same for the decoder of a model that `starkv_compile.compile` looks after.

    A name of its own, so that `entry` does not take the decoder for a model of its own.

    Args:
        options: the arguments of `Pipeline`.
    """
    return _compile(module, example_inputs, Pipeline(**options), None)


def _compile(
    module: GraphModule, example_inputs: Sequence[Any], pipeline: Pipeline, mode: str | None
) -> Callable[..., Any]:
    inner = pipeline.config.inner
    if mode is not None and inner != "inductor":
        raise OptionError(f"mode={mode!r} is Inductor's, but inner={inner!r}")
    return compile_inner(rewrite(module, pipeline), example_inputs, inner, mode)


def rewrite(module: GraphModule, pipeline: Pipeline) -> GraphModule:
    """A rewritten copy of `module`, reported; or `module` itself, with a warning, if the passes
    break."""
    rewritten = GraphModule(module, copy.deepcopy(module.graph))
    rewritten.meta = module.meta
    try:
        report = pipeline.run(rewritten, cache=current_cache.get(), layers=current_layers.get())
    except StarKVError:
        raise
    except Exception as error:  # a fault of ours must not cost the user the model
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"starkv: the passes failed on a graph, which is left as it was ({reason}). Please "
            "report it with this text",
            stacklevel=3,
        )
        rewritten, report = module, GraphReport(failure=reason)
    _file_report(report)
    return rewritten


def _file_report(report: GraphReport) -> None:
    target = current_report.get()
    if target is not None:
        target.graphs.append(report)
    else:
        last_graphs.append(report)
        del last_graphs[:-100]
