"""Runs one prompt through the compiled passes and hands out what each layer scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

import starkv_compile
from starkv_compile import Report, StarKVCache, StarKVConfig
from starkv_compile.hf import with_cache
from starkv_compile.policies import ScoreInputs


def capture(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    config: StarKVConfig,
    observer: Callable[[ScoreInputs], None],
) -> tuple[StarKVCache, Report]:
    """Compresses the cache of one prompt and calls `observer` for each layer that is scored.

    Args:
        model: a model that is not compiled. It is restored afterwards.
        inputs: the arguments of `model.generate`, for one row.
        config: a configuration with inner="eager".
        observer: receives the inputs of each layer's score.

    Returns:
        The compacted cache, and the report on the model.
    """
    cache = StarKVCache(model.config)
    with starkv_compile.compiled(model, config, observer=observer):
        model.generate(**inputs, **with_cache(cache), max_new_tokens=1, do_sample=False)
        return cache, starkv_compile.report(model)
