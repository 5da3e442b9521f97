"""`compile`, `report`, `undo`: the way in that knows the model, not only its graphs."""

from __future__ import annotations

import weakref
from typing import Any, TypeVar

import torch

from .attach import attach, attached, detach
from .backend import decoder_backend, last_graphs
from .config import StarKVConfig
from .errors import UnsupportedModel
from .inner import check_inner
from .reporting import GraphReport, Report

Model = TypeVar("Model", bound=torch.nn.Module)


def compile(model: Model, config: StarKVConfig | None = None, **options: Any) -> Model:
    """Compress the KV cache of a Hugging Face model from now on; returns the same model.

    Compiles the language model and leaves the vision tower eager, which saves graph breaks.
    `model.generate(...)` and `model(...)` are called as before. `undo(model)` takes it back.

    Args:
        model: any model with `get_decoder()` whose forward takes `past_key_values`.
        config: default `StarKVConfig()`; or give its values as `options`, `budget=0.2`.

    Raises:
        OptionError: an option is unknown or impossible.
        UnsupportedModel: there is no decoder with a cache to be found.
        MissingPackage: `inner="tensorrt"` without torch-tensorrt.
    """
    if config is not None and options:
        raise TypeError("give either a StarKVConfig or options, not both")
    config = config or StarKVConfig.from_options(options)
    check_inner(config.inner)
    decoder = _decoder_of(model)
    undo(model)
    attachment = attach(model, config)

    decoder.compile(backend=decoder_backend, options=config.to_options(), dynamic=True)
    kept = weakref.ref(decoder)  # which may be the model itself, and then would live for ever
    attachment.undo.append(lambda: setattr(kept(), "_compiled_call_impl", None))
    inner = model._compiled_call_impl or model._call_impl  # the former: it is its own decoder

    def call(*args: Any, **kwargs: Any) -> Any:
        return attachment.call(inner, args, kwargs)

    # Not hooks: those run neither after a KeyboardInterrupt nor in a way a copy could leave behind.
    model._compiled_call_impl = call
    return model


def _decoder_of(model: torch.nn.Module) -> torch.nn.Module:
    name = type(model).__name__
    if not hasattr(model, "get_decoder"):
        raise UnsupportedModel(
            f"{name} has no get_decoder(), so its language model cannot be found. Compile it whole "
            'with torch.compile(model, backend="starkv"), or rewrite your own graph with '
            "starkv_compile.passes.apply"
        )
    decoder = model.get_decoder()  # type: ignore[operator]
    if not isinstance(decoder, torch.nn.Module):
        raise UnsupportedModel(f"{name}.get_decoder() gives no module but {decoder!r}")
    return decoder


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
