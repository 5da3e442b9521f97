"""Draws GUI episodes, whose screens change a little from step to step.

An episode is a sequence of frames on one grid of cells. One cell is one visual token of the demo
agent. A frame is a set of named elements in cells. From one frame to the next a few elements move,
appear or vanish, as on a desktop. `render` draws everything else (wallpaper, windows, menu bar,
filler text), and no question asks about it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .vocabulary import MAX_STEP, NAMES

Name = tuple[str, str]
Cell = tuple[int, int]  # (row, column)

GRIDS = ((10, 10), (8, 12), (12, 8), (7, 13), (11, 9))  # rows, columns


@dataclass(frozen=True)
class Frame:
    """Holds the elements of one screenshot: their names and cells (row, column)."""

    step: int
    elements: dict[Name, Cell]


@dataclass(frozen=True)
class Episode:
    """Holds frames in time order, on a grid of `rows` x `columns` cells.

    `decoration_seed` fixes the drawing of everything that is not an element.
    """

    rows: int
    columns: int
    frames: tuple[Frame, ...]
    decoration_seed: int


def sample_episode(
    rng: random.Random,
    frames: int,
    grid: Cell | None = None,
    first_step: int | None = None,
    elements: int = 12,
) -> Episode:
    """Draws an episode of `frames` frames. Its step numbers are between 1 and MAX_STEP.

    About 12 of a hundred cells hold an element, because most of a real screen is background too.

    Raises:
        ValueError: `frames` is out of range.
    """
    if not 1 <= frames <= MAX_STEP:
        raise ValueError(f"frames={frames}: expected 1 to {MAX_STEP} frames")
    rows, columns = grid or rng.choice(GRIDS)
    first_step = first_step or rng.randint(1, MAX_STEP + 1 - frames)
    # The menu bar (first row) and the status bar (last row) hold no elements.
    cells = [(r, c) for r in range(1, rows - 1) for c in range(columns)]
    places = rng.sample(cells, elements)
    shown = [Frame(first_step, dict(zip(rng.sample(NAMES, elements), places, strict=True)))]
    for offset in range(1, frames):
        changed = _change(rng, shown[-1].elements, cells)
        shown.append(Frame(first_step + offset, changed))
    return Episode(rows, columns, tuple(shown), rng.getrandbits(32))


def _change(rng: random.Random, before: dict[Name, Cell], cells: list[Cell]) -> dict[Name, Cell]:
    """Moves two elements, and replaces one or two with new ones."""
    after = dict(before)
    taken = set(after.values())
    free = [cell for cell in cells if cell not in taken]
    rng.shuffle(free)
    for name in rng.sample(sorted(after), 2):
        after[name] = free.pop()
    for name in rng.sample(sorted(after), rng.randint(1, 2)):
        del after[name]
        new = rng.choice([n for n in NAMES if n not in before and n not in after])
        after[new] = free.pop()
    return after
