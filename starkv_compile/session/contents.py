"""What a saved session must be like to go on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..cache.checks import expect, is_count, is_integers
from ..errors import OptionError
from ..vision.describe import image_token_ids
from .token_types import TOKEN_TYPES
from .turn import check_template_options, without_pictures

_NAMES = (
    "input_ids",
    "types",
    "grid",
    "history",
    "keep_text",
    "ended",
    "frames",
    "starts",
    "turns",
    "prompt_length",
    "system",
    "template_options",
    "configured_heads",
)
"""What a file holds in addition to the cache. configured_heads: what `has_heads_of` said."""


def check_contents(contents: dict[str, Any], config: Any) -> None:
    """Raises `CacheError` unless a session can go on with `contents`.

    Args:
        contents: what the file holds in addition to the cache.
        config: the configuration of the model at hand.
    """
    expect(
        set(contents) == set(_NAMES),
        f"the session holds {', '.join(contents):.90}; expected {', '.join(_NAMES)}",
    )
    flags = {name: contents[name] for name in ("keep_text", "ended", "configured_heads")}
    _check_settings(contents["history"], flags)
    length = _check_tokens(contents, config)
    _check_history(contents["frames"], contents["starts"], length)
    _check_turns(contents["turns"], length)
    start = contents["prompt_length"]
    expect(
        is_count(start) and start <= length and bool(start) == bool(length),
        f"prompt_length={start!r:.40}; expected a place among {length} tokens",
    )
    _check_template(contents["system"], contents["template_options"])


def _check_settings(history: Any, flags: dict[str, Any]) -> None:
    expect(
        history is None or (is_count(history) and history > 0),
        f"history={history!r:.40}; expected None, or at least 1 screenshot",
    )
    for name, flag in flags.items():
        expect(isinstance(flag, bool), f"{name}={flag!r:.40}; expected True or False")
    expect(
        history is not None or flags["keep_text"],
        "keep_text=False with history=None; expected a history",
    )


def _check_template(system: Any, options: Any) -> None:
    try:
        check_template_options(system, json.loads(options))
    except (OptionError, TypeError, ValueError, RecursionError):
        expect(
            False,
            f"system={system!r:.40}, template_options={options!r:.40}; expected a text or None, "
            "and a dict in JSON",
        )


def _check_tokens(contents: dict[str, Any], config: Any) -> int:
    """Returns the number of tokens."""
    ids, types, grid = (contents[name] for name in ("input_ids", "types", "grid"))
    if ids is None:
        expect(types == {} and grid is None, "types or grids of no tokens; expected tokens")
        return 0
    expect(
        is_integers(ids) and ids.dim() == 2 and len(ids) == 1 and ids.shape[1] > 1,
        f"{_shape(ids)} for input_ids; expected integers of shape [1, tokens]",
    )
    largest = _largest_token(config)
    expect(
        int(ids.min()) >= 0 and int(ids.max()) <= largest,
        f"token ids from {int(ids.min())} to {int(ids.max())}; expected 0 to {largest}",
    )
    _check_images(ids, types, grid)
    return ids.shape[1]


MOST_PATCHES = 1024
"""More patches than one token has in any model."""


def _check_images(ids: torch.Tensor, types: Any, grid: Any) -> None:
    """Token types and grids are there if the model takes them."""
    expect(
        isinstance(types, dict) and set(types) <= set(TOKEN_TYPES),
        f"types={types!r:.60}; expected those of tokens, under the names {', '.join(TOKEN_TYPES)}",
    )
    for name, one in types.items():
        expect(
            is_integers(one) and one.shape == ids.shape,
            f"{_shape(one)} for {name}; expected integers of shape {list(ids.shape)}",
        )
    if grid is None:
        return
    fits = is_integers(grid) and grid.dim() == 2 and grid.shape[1] == 3
    sizes = grid.tolist() if fits else []
    patches = sum(math.prod(size) for size in sizes)
    expect(
        fits
        and all(n > 0 for size in sizes for n in size)
        and patches <= ids.numel() * MOST_PATCHES,
        f"grids {sizes!r:.60} ({_shape(grid)}) for {ids.numel()} tokens; expected those of the "
        "images, of shape [images, 3]",
    )


def has_heads_of(config: Any, layers: Sequence[Any]) -> bool:
    """Whether all layers store the heads that the configuration names. Some models do not."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return all(
        t.shape[1::2] == (heads, size)
        for layer in layers
        if layer.stored
        for t in (layer.keys, layer.values)
    )


def _largest_token(config: Any) -> int:
    """Image tokens may lie beyond the vocabulary."""
    text = config.get_text_config(decoder=True)
    return max([text.vocab_size - 1, *image_token_ids(config)])


def _check_history(frames: Any, starts: Any, length: int) -> None:
    for name, numbers in (("frames", frames), ("starts", starts)):
        expect(
            isinstance(numbers, list) and all(is_count(n) and n <= length for n in numbers),
            f"{name}={numbers!r:.40}; expected numbers from 0 to {length}, one for each image",
        )
    expect(
        starts == sorted(starts) and len(frames) <= len(starts),
        f"{len(frames)} images with frames, in turns that start at {starts!r:.40}; expected a "
        "start for each, in order",
    )


def _check_turns(turns: Any, length: int) -> None:
    whole = isinstance(turns, list) and (bool(length) or not turns)
    for turn in turns if whole else ():
        whole = whole and isinstance(turn, list) and all(isinstance(part, dict) for part in turn)
        whole = whole and bool(turn) and turn == without_pictures(turn)
        for part in turn if whole else ():
            text = part.get("type") == "text" and isinstance(part.get("text"), str)
            whole = whole and (text or part == {"type": "image"})
    expect(whole, f"turns={turns!r:.60}; expected the parts of each turn of the user")


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    return repr(value)[:40]
