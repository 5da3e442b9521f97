"""`compile`, `report`, `undo`: the way in that knows the model, not only its graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from ..config import StarKVConfig
from ..errors import OptionError, UnsupportedModel
from ..passes import Observer
from ..reporting import GraphReport, Report
from .attachment import attach_compiled, attached, detach, find_decoder
from .backend import decoder_backend
from .scope import last_graphs

Model = TypeVar("Model", bound=torch.nn.Module)


def compile(
    model: Model,
    config: StarKVConfig | None = None,
    *,
    observer: Observer | None = None,
    **options: Any,
) -> Model:
    """Compress the KV cache of a Hugging Face model from now on; returns the same model.

    Compiles the language model and leaves the vision tower eager, which saves graph breaks.
    `model.generate(...)` and `model(...)` are called as before. `undo(model)` takes it back.

    Args:
        model: any model with `get_decoder()` whose forward takes a cache.
        config: default `StarKVConfig()`; or give its values, and the policy's, as `options`:
            `budget=0.2, policy="snapkv", pool=7`.
        observer: a function that is called with the `policies.ScoreInputs` of each layer that is
            scored, as the inspector does. With inner="eager" only.

    Raises:
        OptionError: an option is unknown or impossible.
        UnsupportedModel: there is no decoder with a cache to be found.
        MissingPackage: `inner="tensorrt"` without torch-tensorrt.
    """
    if config is not None and options:
        raise TypeError("give either a StarKVConfig or options, not both")
    config = config or StarKVConfig.from_options(options)
    if observer is not None and config.inner != "eager":
        raise OptionError(
            f"observer={observer!r} with inner={config.inner!r}: a compiled graph cannot call a "
            'Python function; use inner="eager" with it'
        )
    if find_decoder(model) is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no get_decoder() that gives its language model, so that "
            'cannot be found. Compile the model whole with torch.compile(model, backend="starkv"), '
            "or rewrite your own graph with starkv_compile.passes.apply"
        )

    def compiler(call: Any) -> Any:
        arguments: Any = {"config": config, "observer": observer}
        return torch.compile(call, backend=decoder_backend, options=arguments, dynamic=True)

    # Not hooks: those run neither after a KeyboardInterrupt nor in a way a copy could leave behind.
    model._compiled_call_impl = attach_compiled(model, config, model._call_impl, compiler)
    return model


@contextlib.contextmanager
def compiled(
    model: Model,
    config: StarKVConfig | None = None,
    *,
    observer: Observer | None = None,
    **options: Any,
) -> Iterator[Model]:
    """`compile` for a `with` block: `with starkv_compile.compiled(model, budget=0.2): ...`.

    The model goes back to what it was when the block ends, or raises: uncompiled, or compiled with
    the configuration that it had before.

    Arguments and errors: those of `compile`.
    """
    before = attached(model)
    compile(model, config, observer=observer, **options)
    try:
        yield model
    finally:
        undo(model)
        if before is not None:
            compile(model, before.config)


def undo(model: torch.nn.Module) -> bool:
    """Give `model` back as it was before `compile` (any of the ways in). Whether it was needed."""
    return detach(model)


def report(model: torch.nn.Module) -> Report:
    """What was found in `model`, rewritten or skipped and why, and what its last prompt saved.

    Raises:
        UnsupportedModel: the model was never compiled with starkv.
    """
    attachment = attached(model)
    if attachment is None:
        raise UnsupportedModel(
            f"{type(model).__name__} was not compiled with starkv: use starkv_compile.compile("
            'model) or torch.compile(model, backend="starkv") first'
        )
    return attachment.report


def last_report() -> GraphReport | None:
    """The last graph compiled outside any model (a compiled function), or None."""
    return last_graphs[-1] if last_graphs else None
