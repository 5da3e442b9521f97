"""What a model says of its attention: which function it runs, and which lengths it accepts."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


def attention_implementation(model: Any) -> str:
    """Returns the name that the library has for it, such as "sdpa"; "own" for other models.

    Any model with a configuration of the library has such a name there. It tells something only if
    the model takes its attention from the library.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return "own"
    of_library = type(model).__module__.startswith("transformers.")
    if not of_library and not getattr(model, "_supports_attention_backend", False):
        return "own"
    return getattr(config.get_text_config(decoder=True), "_attn_implementation", None) or "own"


def counts_in_tensors(model: Any) -> bool:
    """Whether the model runs on a static cache of transformers, whose length is a tensor."""
    of_library = type(model).__module__.startswith("transformers.")
    return of_library or bool(getattr(model, "_can_compile_fullgraph", False))
