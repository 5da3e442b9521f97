"""`generate` with everything that tests look at."""

from __future__ import annotations

from typing import Any

import torch


def generate(model: Any, inputs: dict[str, torch.Tensor], tokens: int = 4, **more: Any) -> Any:
    """Calls `generate`, greedily. Returns tokens, logits and the cache.

    Args:
        inputs: arguments of the model.
        tokens: how many tokens to generate.
        more: further arguments of `generate`.
    """
    with torch.no_grad():
        return model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **more,
        )
