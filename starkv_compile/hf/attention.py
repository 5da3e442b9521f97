"""Which attention function a model runs."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


def attention_implementation(model: Any) -> str:
    """Returns the name that the library has for it, such as "sdpa"; "own" for other models."""
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return "own"
    return getattr(config.get_text_config(decoder=True), "_attn_implementation", None) or "own"
