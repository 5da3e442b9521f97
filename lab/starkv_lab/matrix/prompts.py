"""Makes prompts for any family: text, two images of different shape, text."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .recipes import AFTER, ASIDE, BEFORE, BETWEEN, IMAGES, WORDS
from .tiny import FIRST_WORD, LAST_WORD

GRIDS = ((4, 6), (3, 5))  # rows and columns of tokens, where a family takes any shape
VISION_CONFIGS = ("vision_config", "vision_tower_config", "vq_config", "vit_config")


@dataclass(frozen=True)
class FamilyInputs:
    """Holds the arguments of `generate`, and describes the images in them.

    tokens: number of image tokens of each image, empty for a prompt of text only. grids: rows and
    columns of each image, where the family takes any shape. aside: whether the images stay
    separate from the prompt's tokens. why_no_image: why the prompt has text only.
    """

    arguments: dict[str, Any]
    tokens: Sequence[int] = ()
    grids: Sequence[tuple[int, int]] = ()
    aside: bool = False
    why_no_image: str = ""


def make_prompt(family: str, model: Any) -> FamilyInputs:
    """Makes a prompt with two images, or with text only if the family's inputs are not known."""
    try:
        return _with_images(family, model)
    except Exception as error:  # a vision tower may raise anything on these inputs
        return FamilyInputs(_arguments(model, _words(WORDS)), why_no_image=said(error))


def said(error: Exception) -> str:
    """Returns an error's kind and the beginning of its first line."""
    reason = str(error).strip().partition("\n")[0][:120]
    return f"{type(error).__name__}: {reason}"


def _with_images(family: str, model: Any) -> FamilyInputs:
    config = model.config
    if family in ASIDE:
        return FamilyInputs(
            {**_arguments(model, _words(WORDS)), **_given(ASIDE[family])}, aside=True
        )
    marker = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if marker is None:
        raise ValueError("no image_token_id")
    core = model.model if hasattr(getattr(model, "model", None), "get_image_features") else model
    known = inspect.signature(core.get_image_features).parameters
    images = _images(config, known) | _given(IMAGES.get(family, {}))
    images = {name: value for name, value in images.items() if value is not None}
    with torch.no_grad():
        features = _rows(core.get_image_features(**images))
    grids = GRIDS if "image_grid_thw" in images else ()
    tokens = [rows * columns for rows, columns in grids] or [features // 2] * 2
    if sum(tokens) != features:
        raise ValueError(f"{features} image features, expected {sum(tokens)}")
    words = [
        *_words(BEFORE),
        *[marker] * tokens[0],
        *_words(BETWEEN),
        *[marker] * tokens[1],
        *_words(AFTER),
    ]
    return FamilyInputs({**_arguments(model, words), **images}, tokens, grids)


def _images(config: Any, known: Any) -> dict[str, torch.Tensor]:
    """Makes pixels of two images: patches with their grid, or squares of the tower's size."""
    vision = next(filter(None, (getattr(config, name, None) for name in VISION_CONFIGS)), None)
    if vision is None:
        raise ValueError("no vision configuration")
    generator = torch.Generator().manual_seed(0)
    if "image_grid_thw" in known:
        merge: int = getattr(vision, "spatial_merge_size", 0) or getattr(vision, "merge_size", 2)
        channels: int = getattr(vision, "in_channels", 0) or getattr(vision, "num_channels", 3)
        patch = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        grid = torch.tensor([[1, rows * merge, columns * merge] for rows, columns in GRIDS])
        pixels = torch.randn(int(grid.prod(1).sum()), patch, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": grid}
    size = getattr(vision, "image_size", None) or 16
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = torch.randn(2, 3, height, width, generator=generator)
    sizes = torch.tensor([[height, width]] * 2)
    return {"pixel_values": pixels, **({"image_sizes": sizes} if "image_sizes" in known else {})}


def _given(recipe: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    """Makes a recipe's inputs: noise of a shape (tuple), given numbers (list), or none (None)."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(value, generator=generator)
        if isinstance(value, tuple)
        else None
        if value is None
        else torch.tensor(value)
        for name, value in recipe.items()
    }


def _arguments(model: Any, words: list[int]) -> dict[str, Any]:
    ids = torch.tensor([words])
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        marker = getattr(model.config, "image_token_id", None)
        arguments["mm_token_type_ids"] = (ids == (-1 if marker is None else marker)).long()
    return arguments


def _words(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(FIRST_WORD, LAST_WORD, (count,), generator=generator).tolist()


def _rows(features: Any) -> int:
    """Counts the embeddings that `get_image_features` returned."""
    pooled = getattr(features, "pooler_output", None)
    if pooled is not None:
        return _rows(pooled)
    if isinstance(features, torch.Tensor):
        return features.numel() // features.shape[-1]
    if isinstance(features, (list, tuple)):
        return sum(_rows(part) for part in features)
    return _rows(features.last_hidden_state)
