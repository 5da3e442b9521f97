"""The backend: it rewrites Dynamo's graph, then the inner backend compiles the result."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.fx import GraphModule

from ..config import StarKVConfig
from ..errors import OptionError, StarKVError
from ..passes import Pipeline
from ..passes.markers import read_past_markers
from ..reporting import GraphReport
from .inner import TRACED_AGAIN, compile_inner, record_examples
from .scope import current_scope

log = logging.getLogger("starkv")

_said: set[str] = set()
"""What this process has announced that it compiles."""


def starkv_backend(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Backend of `torch.compile(model, backend="starkv", options={...})`.

    Args:
        module: the graph that Dynamo captured.
        example_inputs: its inputs, as fake tensors.
        options: flat values of `StarKVConfig` and of the policy.
        mode: Inductor's mode, as in `torch.compile`.

    Raises:
        OptionError: an option is unknown or impossible, or `mode` is given without Inductor.
    """
    return _compile(module, example_inputs, Pipeline(StarKVConfig.from_options(options)), mode)


def decoder_backend(
    module: GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any]
) -> Callable[..., Any]:
    """The same for the decoder of a model that `starkv_compile.compile` has attached.

    It is a second function so that `entry` does not attach the decoder as another model.

    Args:
        options: the arguments of `Pipeline`.
    """
    return _compile(module, example_inputs, Pipeline(**options), None)


def _compile(
    module: GraphModule, example_inputs: Sequence[Any], pipeline: Pipeline, mode: str | None
) -> Callable[..., Any]:
    config = pipeline.config
    inner = config.inner
    if mode is not None and inner != "inductor":
        raise OptionError(
            f"mode={mode!r} with inner={inner!r}: only Inductor has modes; leave out mode, or use "
            'inner="inductor"'
        )
    regional = config.regional_compilation and not (
        mode is not None or config.keeps_everything or _needs_whole_graphs()
    )
    return compile_inner(rewrite(module, pipeline), example_inputs, inner, mode, regional)


def _needs_whole_graphs() -> bool:
    """Whether torch is set to something that pieces of a graph would not give."""
    return (
        torch.is_grad_enabled()  # a backward graph reads facts about the graph compiled last
        or dynamo_config.caching_precompile  # stores what one call of Inductor returned
        or functorch_config.bundled_autograd_cache  # `aot_compile` does too
        or inductor_config.freezing  # of parameters that are attributes of the graph
        or inductor_config.triton.cudagraphs  # knows which inputs stay where they are
    )


def rewrite(module: GraphModule, pipeline: Pipeline) -> GraphModule:
    """Returns a rewritten copy of `module` and reports it. If the passes fail, warns and returns
    `module` itself."""
    rewritten = GraphModule(module, copy.deepcopy(module.graph))
    rewritten.meta = module.meta
    captured, scope = set(rewritten.graph.nodes), current_scope()
    by_caller = pipeline.config.shorten_outputs and scope.cache == "nobody"
    try:
        read_past_markers(rewritten.graph)
        report = pipeline.run(
            rewritten,
            cache="caller" if by_caller else scope.cache,
            layers=scope.layers,
            unmarked=scope.unmarked,
        )
        if pipeline.config.inner in TRACED_AGAIN:
            record_examples(rewritten, captured)
    except StarKVError:
        raise
    except Exception as error:  # a fault in the passes must not cost the user the model
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"starkv: the passes failed on a graph, which stays as it was ({reason}). Please open "
            "an issue with this text",
            stacklevel=3,
        )
        rewritten, report = module, GraphReport(failure=reason)
    scope.file(report)
    if pipeline.config.inner == "inductor":
        _announce(report)
    if scope.report is None or by_caller:
        _warn_of_refusals(report)
    return rewritten


def _warn_of_refusals(report: GraphReport) -> None:
    """Says why the graph of a function, or of code that keeps its own cache, stays as it is."""
    reasons = sorted({site.reason for site in report.sites if site.reason})
    if reasons:
        text = "; ".join(reasons)
        warnings.warn(f"starkv left a compiled graph uncompressed: {text}", stacklevel=4)


def _announce(report: GraphReport) -> None:
    """Logs a line before Inductor compiles the first graph of its kind. report: of that graph."""
    kind = "a prompt" if report.found else "decoding" if report.decode_sites else ""
    if kind and kind not in _said:
        _said.add(kind)
        log.warning(
            "starkv: Inductor compiles the model for %s, once. This takes from seconds to minutes; "
            'later processes find most of it in the cache on disk. inner="eager" starts at once.',
            kind,
        )
