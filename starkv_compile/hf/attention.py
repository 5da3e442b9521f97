"""What a model says of its attention: which function it runs, and which lengths it accepts."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


def attention_implementation(model: Any) -> str:
    """Returns the name that the library has for it, such as "sdpa"; "own" for other models."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return "own"
    return getattr(config.get_text_config(decoder=True), "_attn_implementation", None) or "own"


def takes_any_mask(model: Any) -> bool:
    """Whether the model takes its attention from the library, and one with a mask of any shape.

    A model of one's own has the name of an attention in its configuration, too, whatever it runs.
    """
    dispatches = of_library(model) or getattr(model, "_supports_attention_backend", False)
    return bool(dispatches) and attention_implementation(model) in ("sdpa", "eager")


def counts_in_tensors(model: Any) -> bool:
    """Whether the model runs on a static cache of transformers, whose length is a tensor."""
    return of_library(model) or bool(getattr(model, "_can_compile_fullgraph", False))


def of_library(model: Any) -> bool:
    """Whether transformers has the model's class."""
    return type(model).__module__.startswith("transformers.")
