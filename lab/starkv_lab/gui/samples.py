"""Describes benchmarks and their questions: screenshots, instruction and right answer."""

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
    """Describes an earlier step of the benchmark's demonstration.

    said: its instruction in words. act: returns its actions from the size of its screenshot, with
    points in pixels of that screenshot.
    """

    said: str
    act: Callable[[Size], tuple[Action, ...]] = lambda size: ()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Describes one question.

    id: unique in its data set. setting: "point" asks where an element is, "desktop" and "phone" ask
    for the next action. screens: files or encoded images, oldest first, so the current screen comes
    last. past: the earlier steps, oldest first; the earlier screens belong to the last of them.
    target: the right answer, in a form that the data set's rule reads and JSON can hold. group:
    values by which tables are split. trajectory: an id that all steps of one demonstration share,
    if the data set has all of them in their order, and their actions in `past`; else None.
    """

    id: str
    setting: str
    instruction: str
    screens: Sequence[Path | bytes]
    target: Any
    group: Mapping[str, str]
    past: Sequence[Past] = ()
    trajectory: str | None = None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Says how much of a trajectory a prompt shows.

    images: most screenshots, of the current step and of the newest earlier steps. texts: most
    earlier steps. level: AndroidControl's instructions, "high" for the goal or "low" for the step.
    """

    images: int = 5
    texts: int = 10
    level: str = "high"


@dataclass(frozen=True)
class Dataset:
    """Describes a benchmark.

    read: yields the samples of an unpacked folder, in the same order each time. score: returns 0 to
    1 by the published rule, from a target, the actions, and the size of the current screenshot.
    files: patterns of the files that `read` reads. tables: names in `Sample.group` that split the
    reported accuracy, a sequence for each table. tokens: most tokens of an answer. source: where to
    download it.
    """

    name: str
    title: str
    read: Callable[[Path, Reading], Iterator[Sample]]
    score: Callable[[Any, Sequence[Action], Size], float]
    files: Sequence[str]
    tables: Sequence[Sequence[str]]
    tokens: int
    source: str


def open_screen(screen: Path | bytes) -> Image:
    """Reads a screenshot in RGB.

    Raises:
        StarKVError: the file is missing, or is no image.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(screen) if isinstance(screen, bytes) else screen) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        where = "a screenshot of a record" if isinstance(screen, bytes) else str(screen)
        raise StarKVError(
            f"{where}: not an image that can be read ({error}); unpack the data set again"
        ) from error
