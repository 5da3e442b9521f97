"""`compile`, `compiled`, `undo` and `report`: the functions that take a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..config import StarKVConfig
from ..errors import OptionError, UnsupportedModel
from ..hf.language_models import language_models
from ..passes import Observer
from ..reporting import GraphReport, Report
from .attachment import attach, attached, detach, set_aside
from .backend import decoder_backend
from .scope import last_graphs

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..options import Options

Model = TypeVar("Model", bound=torch.nn.Module)


def compile(
    model: Model,
    config: StarKVConfig | None = None,
    *,
    observer: Observer | None = None,
    **options: Unpack[Options],
) -> Model:
    """Compresses the KV cache of a Hugging Face model from now on. Returns the same model.

    The language model is compiled. The vision tower stays eager, which saves graph breaks. Call
    `model.generate(...)` and `model(...)` as before. `undo(model)` restores the model.

    Args:
        model: a module that holds a language model: one with `get_decoder()` whose forward takes a
            Hugging Face `Cache`. It may sit anywhere in the module, as in a wrapper of PEFT.
        config: the configuration. None: `StarKVConfig()`.
        observer: a function that is called with the `policies.ScoreInputs` of each layer that is
            scored. The inspector uses it. Needs inner="eager".
        options: in place of `config`, its values and those of the policy:
            `budget=0.2, policy="snapkv", pool=7`.

    Raises:
        TypeError: both a config and options are given, or the model is no module.
        OptionError: an option is unknown or impossible.
        UnsupportedModel: there is no such language model in it.
        MissingPackage: `inner="tensorrt"` without torch-tensorrt.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"compile got {model!r:.60}: expected a model; load it first, with "
            "transformers.AutoModelForImageTextToText.from_pretrained(name), or "
            "AutoModelForCausalLM for a text model"
        )
    if config is not None and options:
        raise TypeError("both a config and options were given; put all values into one of them")
    config = config or StarKVConfig.from_options(options)
    if observer is not None and config.inner != "eager":
        raise OptionError(
            f"observer={observer!r} with inner={config.inner!r}: a compiled graph cannot call a "
            'Python function; use inner="eager" with it'
        )
    if not config.shorten_outputs and not language_models(model):
        raise UnsupportedModel(
            f"{type(model).__name__} holds no language model with get_decoder() whose forward "
            "takes a Cache of transformers. If your own code counts positions on from the "
            "uncompressed length and makes masks as long as the cache, give "
            "shorten_outputs=True; or rewrite your own graph with starkv_compile.passes.apply"
        )

    def compiler(call: Any) -> Any:
        return torch.compile(
            call,
            backend=decoder_backend,
            options={"config": config, "observer": observer},  # type: ignore[dict-item]
            dynamic=True,
            fullgraph=config.shorten_outputs,
        )

    # Hooks would not do: after a KeyboardInterrupt they do not run, and a copy of the model would
    # keep them.
    attach(model, config, compiler)
    return model


@contextlib.contextmanager
def compiled(
    model: Model,
    config: StarKVConfig | None = None,
    *,
    observer: Observer | None = None,
    **options: Unpack[Options],
) -> Iterator[Model]:
    """Compresses inside a block only: `with starkv_compile.compiled(model, budget=0.2): ...`.

    When the block ends or raises, the model is again what it was before: uncompiled, or compiled
    by whatever compiled it, with its report. `model` may be what `torch.compile` returned.

    Arguments and errors are those of `compile`.
    """
    with set_aside(model) as inside:
        compile(inside, config, observer=observer, **options)
        yield model


def undo(model: torch.nn.Module) -> bool:
    """Restores `model` to what it was before `compile`. Returns True if it was compiled.

    This works for every way to compile a model: `compile`, `torch.compile` and `model.compile`.
    """
    return detach(model)


def report(model: torch.nn.Module) -> Report:
    """Returns what was rewritten or skipped in `model`, why, and what its last prompt saved.

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
    """Returns the report of the last graph compiled outside a model (a function's), or None."""
    return last_graphs[-1] if last_graphs else None
