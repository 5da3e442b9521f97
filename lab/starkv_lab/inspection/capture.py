"""One prompt through the compiled passes, and what scoring reads in each layer handed out."""

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
    """Compress one prompt; `observer` is called as layers are scored.

    Args:
        model: not compiled; it is left as it was.
        inputs: of `model.generate`, one row.
        config: with inner="eager".
        observer: called with each layer's values.

    Returns:
        The compacted cache, and what was found in the model.
    """
    cache = StarKVCache(model.config)
    with starkv_compile.compiled(model, config, observer=observer):
        model.generate(**inputs, **with_cache(cache), max_new_tokens=1, do_sample=False)
        return cache, starkv_compile.report(model)
