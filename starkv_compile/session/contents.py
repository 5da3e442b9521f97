"""What a saved session must be like to go on."""

from __future__ import annotations

from typing import Any

import torch

from ..cache.checks import expect, is_count, is_integers
from .turn import without_pictures

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
)


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
    _check_settings(contents["history"], contents["keep_text"], contents["ended"])
    length = _check_tokens(contents, config)
    _check_images(contents["frames"], contents["starts"], length)
    _check_turns(contents["turns"], length)


def _check_settings(history: Any, keep_text: Any, ended: Any) -> None:
    expect(
        history is None or (is_count(history) and history > 0),
        f"history={history!r:.40}; expected None, or at least 1 screenshot",
    )
    expect(
        isinstance(keep_text, bool) and isinstance(ended, bool),
        f"keep_text={keep_text!r:.40}, ended={ended!r:.40}; expected True or False",
    )
    expect(
        history is not None or keep_text, "keep_text=False with history=None; expected a history"
    )


def _check_tokens(contents: dict[str, Any], config: Any) -> int:
    """Returns the number of tokens."""
    ids, types, grid = (contents[name] for name in ("input_ids", "types", "grid"))
    if ids is None:
        expect(types is None and grid is None, "types or grids of no tokens; expected tokens")
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
    expect(
        types is None or (is_integers(types) and types.shape == ids.shape),
        f"{_shape(types)} for the types of tokens; expected integers of {list(ids.shape)}",
    )
    expect(
        grid is None
        or (
            is_integers(grid)
            and grid.dim() == 2
            and grid.shape[1] == 3
            and bool((grid > 0).all() and (grid <= ids.shape[1] * _PATCHES).all())
        ),
        f"{_shape(grid)} for the images' grids; expected positive integers of shape [images, 3]",
    )
    return ids.shape[1]


_PATCHES = 1024
"""More patches along a side than one token has in any model."""


def _largest_token(config: Any) -> int:
    """Image tokens may lie beyond the vocabulary."""
    text = config.get_text_config(decoder=True)
    names = ("image_token_id", "image_token_index", "video_token_id")
    known = [getattr(config, name, None) for name in names]
    return max([text.vocab_size - 1, *(token for token in known if isinstance(token, int))])


def _check_images(frames: Any, starts: Any, length: int) -> None:
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
    whole = isinstance(turns, list) and bool(turns) == bool(length)
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
