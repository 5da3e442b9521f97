"""How many tokens a screenshot takes, from a checkpoint's files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from starkv_compile import OptionError

DEFAULT_LIMITS = (56 * 56, 16384 * 28 * 28)
"""Pixels that the processors of Qwen-VL allow if a checkpoint says nothing."""


def screen_tokens(folder: Path, config: Any, width: int, height: int, most: int | None) -> int:
    """Tokens of one screenshot of `width` x `height` pixels.

    Qwen-VL's way is computed: patches are merged in squares, and the picture is resized so that it
    has whole squares and its pixels stay within the processor's limits. For other families the
    processor itself is asked.

    Args:
        folder: where config.json is, and preprocessor_config.json and the tokenizer if there are.
        config: configuration of transformers.
        width, height: of the screenshot.
        most: largest number of pixels after resizing; None: the processor's.

    Raises:
        OptionError: nothing in the folder says how many.
    """
    vision = getattr(config, "vision_config", None)
    patch, merge = (getattr(vision, name, None) for name in ("patch_size", "spatial_merge_size"))
    if isinstance(patch, int) and isinstance(merge, int):
        fewest, usual = _limits(folder)
        most = usual if most is None else most
        return _merged_squares(width, height, patch * merge, fewest, most)
    found = _by_processor(folder, width, height)
    if found is None:
        raise OptionError(
            f"a {config.model_type}: its folder does not say how many tokens a screenshot takes; "
            "add the files of its processor, or give --tokens-per-screen"
        )
    return found


def _limits(folder: Path) -> tuple[int, int]:
    """(fewest, most) pixels after resizing, under the names of old and new processors."""
    said = _read(folder / "preprocessor_config.json")
    if said is None:  # transformers 5 saves one file for the whole processor
        said = (_read(folder / "processor_config.json") or {}).get("image_processor")
    if not isinstance(said, dict):
        return DEFAULT_LIMITS
    size = said.get("size") or {}
    fewest = said.get("min_pixels") or size.get("shortest_edge") or DEFAULT_LIMITS[0]
    most = said.get("max_pixels") or size.get("longest_edge") or DEFAULT_LIMITS[1]
    return int(fewest), int(most)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        said = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def _merged_squares(width: int, height: int, side: int, fewest: int, most: int) -> int:
    """Squares of `side` pixels in the resized picture."""
    rows, columns = (max(1, round(n / side)) for n in (height, width))
    pixels = rows * columns * side * side
    if pixels > most:
        shrink = math.sqrt(height * width / most) * side
        rows, columns = (max(1, math.floor(n / shrink)) for n in (height, width))
    elif pixels < fewest:
        grow = math.sqrt(fewest / (height * width)) / side
        rows, columns = (math.ceil(n * grow) for n in (height, width))
    return rows * columns


def _by_processor(folder: Path, width: int, height: int) -> int | None:
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        counted = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        return int(counted["num_image_tokens"][0])
    except Exception:  # of a folder without a processor, or one that cannot say
        return None
