"""The backend: rewrite Dynamo's graph, then let the inner backend compile it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from ..config import StarKVConfig
from ..errors import OptionError, StarKVError
from ..passes import Pipeline
from ..reporting import GraphReport
from .inner import compile_inner
from .scope import current_scope


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
    scope = current_scope()
    try:
        report = pipeline.run(rewritten, cache=scope.cache, layers=scope.layers)
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
    scope.file(report)
    return rewritten
