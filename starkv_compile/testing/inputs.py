"""Prompts of frames and text for tiny models, as a processor gives them, and `generate` on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .models import IMAGE_TOKEN, PAD, VISION_END, VISION_START


@dataclass(frozen=True)
class TinyPrompt:
    """A prompt of frames, each between two markers, then random text.

    Attributes:
        grids: (rows, columns) of each frame in merged tokens. LLaVA's are always 4 x 4.
        text: number of tokens of text.
        seed: chooses the text and the pixels.
    """

    grids: Sequence[tuple[int, int]] = ((4, 4), (4, 4))
    text: int = 30
    seed: int = 0

    def token_ids(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed)
        ids = [5, 6]
        for rows, columns in self.grids:
            ids += [VISION_START, *[IMAGE_TOKEN] * (rows * columns), VISION_END]
        return ids + torch.randint(10, 180, (self.text,), generator=generator).tolist()


def tiny_inputs(family: str, *prompts: TinyPrompt) -> dict[str, torch.Tensor]:
    """Returns the model inputs for a batch of prompts, padded on the left."""
    prompts = prompts or (TinyPrompt(),)
    rows = [prompt.token_ids() for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    grids = [grid for prompt in prompts for grid in prompt.grids]
    generator = torch.Generator().manual_seed(prompts[0].seed)
    if family == "llava":
        if grids:
            inputs["pixel_values"] = torch.randn(len(grids), 3, 16, 16, generator=generator)
        return inputs
    inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    if grids:
        patches = [torch.randn(4 * r * c, 3 * 2 * 4 * 4, generator=generator) for r, c in grids]
        inputs["pixel_values"] = torch.cat(patches)
        inputs["image_grid_thw"] = torch.tensor([[1, 2 * r, 2 * c] for r, c in grids])
    return inputs


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
