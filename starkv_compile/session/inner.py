"""The Hugging Face model inside wrappers: PEFT, `torch.compile`, `DataParallel` and their like."""

from __future__ import annotations

import inspect
from typing import Any


def inner_model(model: Any) -> Any:
    """Returns the outermost Hugging Face model in `model`; `model` itself if it contains none."""
    from transformers import PreTrainedModel

    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def generating_model(model: Any) -> Any:
    """Returns what to call `generate` of: `model`, or the model in a wrapper without `generate`."""
    return model if callable(getattr(model, "generate", None)) else inner_model(model)


def positions_owner(model: Any) -> Any:
    """Returns the module in `model` that computes M-RoPE positions; None if there is none."""
    return next((m for m in model.modules() if _computes_positions(type(m))), None)


def _computes_positions(kind: type) -> bool:
    method = getattr(kind, "get_rope_index", None)
    return method is not None and "mm_token_type_ids" in inspect.signature(method).parameters
