"""Rows and columns of each image of a prompt, from the inputs and outputs of the vision tower.

Since transformers 5.23, `generate` encodes images before it calls the model. The model then sees
features only, which do not show rows and columns. So the inputs are noted on the features.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .layout import TEXT

_METHOD, _NOTE = "get_image_features", "starkv_shapes"
_SHAPES = ("image_grid_thw", "video_grid_thw", "image_sizes")
Shape = tuple[int, int]
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def note_shapes(model: Any) -> Callable[[], None]:
    """Makes the model's `get_image_features` note its inputs on its result. Returns undo."""
    core = getattr(model, "base_model", model)
    method = getattr(type(core), _METHOD, None)
    if method is None or _METHOD in vars(core):
        return lambda: None
    noting = functools.partial(_features_with_note, core)  # copied along with the model, if it is
    parameters = list(inspect.signature(method).parameters.values())[1:]
    noting.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    setattr(core, _METHOD, noting)

    def undo() -> None:
        vars(core).pop(_METHOD, None)

    return undo


def _features_with_note(core: Any, *args: Any, **kwargs: Any) -> Any:
    method = getattr(type(core), _METHOD)
    features = method(core, *args, **kwargs)
    if not torch.compiler.is_compiling() and hasattr(features, "__dict__"):
        given = inspect.signature(method).bind(core, *args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        note = {name: given[name] for name in _SHAPES if given.get(name) is not None}
        if hasattr(core.config, "image_grid_pinpoints"):  # encoded in tiles: no shape fits them
            note.pop("image_sizes", None)
        object.__setattr__(features, _NOTE, note)
    return features


def image_shapes(is_image: torch.Tensor, named: Mapping[str, Any]) -> list[Shape]:
    """Returns (rows, columns) of each frame, in order; [] if they are unknown.

    Grids count patches. The number of patches for each token follows from the number of tokens, so
    no name in the model's configuration matters. A prompt with images and videos gives [], because
    their order among the tokens is unknown.

    Args:
        is_image: [B, S] bool, the prompt's image tokens.
        named: the model's arguments, with their names as keys.
    """
    outputs = named.get("mm_encoder_outputs") or {}
    if outputs.get("video") is not None:
        return []
    encoded = outputs.get("image")
    known = {**getattr(encoded, _NOTE, {}), **named}
    grids = [known[name] for name in _SHAPES[:2] if known.get(name) is not None]
    tokens = int(is_image.sum())
    if len(grids) == 1 and tokens:
        merge = max(1, math.isqrt(int(grids[0].prod(1).sum()) // tokens))
        return [
            (height // merge, width // merge)
            for time, height, width in grids[0].tolist()
            for _ in range(time)
        ]
    counts = _tokens_of_each(getattr(encoded, "pooler_output", None))
    sizes = known.get("image_sizes")
    if sum(counts) != tokens or sizes is None or len(sizes) != len(counts):
        return []
    return _fitting(counts, torch.as_tensor(sizes).tolist())


def _tokens_of_each(features: Any) -> list[int]:
    """Number of features of each image: from a list, or from one tensor [images, tokens, E]."""
    if isinstance(features, torch.Tensor):
        return [features.shape[1]] * len(features) if features.dim() == 3 else []
    if isinstance(features, (list, tuple)):
        return [f.numel() // f.shape[-1] for f in features if isinstance(f, torch.Tensor)]
    return []


def _fitting(counts: list[int], sizes: list[list[int]]) -> list[Shape]:
    """Rows and columns in the ratio of each image's height and width; [] if none fit."""
    shapes = []
    for count, (height, width) in zip(counts, sizes, strict=True):
        rows = max(1, round(math.sqrt(count * height / width)))
        if count % rows or abs(rows - count / rows * height / width) >= 1:
            return []
        shapes.append((rows, count // rows))
    return shapes


def deal_out(is_image: torch.Tensor, shapes: list[Shape]) -> Parts | None:
    """frame, row, column [B, S] by dealing `shapes` to the image tokens; None if they do not fit.

    Tokens between those of one image, such as the ends of its rows, are text.
    """
    parts = torch.full((3, *is_image.shape), TEXT)
    remaining = list(shapes)
    for i, flags in enumerate(is_image.cpu()):
        places = flags.nonzero()[:, 0]
        start = number = 0
        while start < len(places) and remaining:
            rows, columns = remaining.pop(0)
            span = places[start : start + rows * columns]
            offset = torch.arange(len(span))
            parts[0, i, span] = number
            parts[1, i, span], parts[2, i, span] = offset // columns, offset % columns
            start, number = start + rows * columns, number + 1
        if start != len(places):
            return None
    if remaining:
        return None
    frame, row, column = parts.to(is_image.device)
    return frame, row, column
