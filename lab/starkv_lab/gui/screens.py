"""Converts points between a screenshot's file and the resized picture that the model sees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from starkv_compile import StarKVError

from .actions import Point
from .samples import Size


@dataclass(frozen=True)
class Screen:
    """Holds the size of a screenshot's file, and the size shown to the model after resizing."""

    size: Size
    shown: Size

    def from_shown(self, point: Point) -> Point:
        """Converts a point from pixels that the model saw to the file's pixels."""
        return self._scaled(point, self.shown)

    def from_thousandths(self, point: Point) -> Point:
        return self._scaled(point, (1000, 1000))

    def to_shown(self, point: Point) -> tuple[int, int]:
        """Converts a point from the file's pixels to whole pixels that the model saw."""
        return self._whole(point, self.shown)

    def to_thousandths(self, point: Point) -> tuple[int, int]:
        return self._whole(point, (1000, 1000))

    def _scaled(self, point: Point, of: Size) -> Point:
        return point[0] * self.size[0] / of[0], point[1] * self.size[1] / of[1]

    def _whole(self, point: Point, of: Size) -> tuple[int, int]:
        return round(point[0] * of[0] / self.size[0]), round(point[1] * of[1] / self.size[1])


def shown_size(size: Size, image_processor: Any) -> Size:
    """Returns the size to which Qwen-VL's image processors resize a screenshot.

    The sides are whole visual tokens, and as near to the original as the limits of pixels allow.

    Raises:
        StarKVError: the processor resizes in another way.
    """
    try:
        token = image_processor.patch_size * image_processor.merge_size
        low, high = (image_processor.size[name] for name in ("shortest_edge", "longest_edge"))
    except (AttributeError, KeyError, TypeError) as error:
        raise StarKVError(
            f"{type(image_processor).__name__} is no image processor of Qwen-VL's kind ({error}), "
            "so `bench gui` does not know how it resizes screenshots and what coordinates mean; "
            "give a checkpoint with such a processor"
        ) from error
    width, height = (round(side / token) * token for side in size)
    pixels = size[0] * size[1]
    if width * height > high:
        shrink = math.sqrt(pixels / high)
        width, height = (max(token, math.floor(side / shrink / token) * token) for side in size)
    elif width * height < low:
        grow = math.sqrt(low / pixels)
        width, height = (math.ceil(side * grow / token) * token for side in size)
    return width, height


def check_shown(screens: list[Screen], grid: Any, patch: int) -> None:
    """Compares the expected sizes with the processor's `image_grid_thw` [images, 3].

    Raises:
        StarKVError: the processor resized in another way, so coordinates would be read wrongly.
    """
    really = [(columns * patch, rows * patch) for _, rows, columns in grid.tolist()]
    wanted = [screen.shown for screen in screens]
    if really != wanted:
        raise StarKVError(
            f"the processor resized screenshots to {really}, not to {wanted}, so coordinates would "
            "be read wrongly; give a checkpoint with Qwen-VL's resizing"
        )
