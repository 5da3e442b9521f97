"""A question of a benchmark: screenshots, what is asked, and what would be right."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starkv_compile import StarKVError

from .actions import Action

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]  # width, height, in pixels


@dataclass(frozen=True)
class Past:
    """A step that was taken before, as the benchmark's demonstration has it.

    said: its instruction in words. act: given the size of its screenshot, the actions; their
    points are in pixels of that.
    """

    said: str
    act: Callable[[Size], tuple[Action, ...]] = lambda size: ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question.

    id: unique in its data set. setting: "point" (where is it), "desktop" or "phone" (what is to be
    done). screens: oldest first, the current one last: files, or encoded images. past: the steps
    before, oldest first; the screens before the current one belong to the last of them. target: of
    any form that the data set's rule reads and JSON can hold. group: what tables are made of.
    """

    id: str
    setting: str
    instruction: str
    screens: Sequence[Path | bytes]
    target: Any
    group: Mapping[str, str]
    past: Sequence[Past] = ()


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What can be chosen of a data set.

    texts: at most so many earlier steps of a trajectory. images: at most so many screenshots, of
    the current step and of the newest of those. level: of AndroidControl's instructions, "high"
    (the goal) or "low" (the step).
    """

    images: int = 5
    texts: int = 10
    level: str = "high"


@dataclass(frozen=True)
class Dataset:
    """A benchmark.

    read: its samples, of the folder they were unpacked in; the same order each time.
    score: 0 to 1, by the published rule: of a target, the actions, and the current screenshot's
    size. files: patterns of what `read` reads, to tell one copy from another. tables: what accuracy
    is reported by, each a choice of `Sample.group`'s names. tokens: the longest answer.
    """

    name: str
    title: str
    read: Callable[[Path, Reading], Iterator[Sample]]
    score: Callable[[Any, Sequence[Action], Size], float]
    files: Sequence[str]
    tables: Sequence[Sequence[str]]
    tokens: int


def open_screen(screen: Path | bytes) -> Image:
    """The screenshot, in RGB.

    Raises:
        StarKVError: it is not there, or no image.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(screen) if isinstance(screen, bytes) else screen) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        where = "a screenshot of a record" if isinstance(screen, bytes) else str(screen)
        raise StarKVError(f"{where}: not an image that can be read ({error})") from error
