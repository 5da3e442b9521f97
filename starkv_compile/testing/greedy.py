"""`generate` as tests look at it."""

from __future__ import annotations

from typing import Any

import torch


def generate(model: Any, inputs: dict[str, torch.Tensor], tokens: int = 4, **more: Any) -> Any:
    """Greedy `generate` with logits and the cache."""
    with torch.no_grad():
        return model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **more,
        )
