"""Asks questions about an episode, and judges answers.

Every answer begins with a preamble ("click (", "it is"), as real agents write a thought before the
coordinates. The first token after a prefill comes from the full cache under any policy. So an
answer without a preamble would not test the compacted cache.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .vocabulary import BIN_CENTERS, coordinate_bin
from .world import Cell, Episode, Frame, Name

KINDS = ("click", "where", "what", "return")
"""click needs the current frame, where and what need the frame that they name, return both."""


@dataclass(frozen=True)
class Question:
    """Holds the user's line (`text`), the expected reply, and the step of the named frame."""

    kind: str
    step: int
    text: str
    answer: str

    def is_right(self, reply: str) -> bool:
        """Whether `reply` equals the answer. Spacing does not count."""
        return reply.split() == self.answer.split()


def _where(episode: Episode, cell: Cell) -> str:
    row, column = cell
    x = BIN_CENTERS[coordinate_bin(column, episode.columns)]
    y = BIN_CENTERS[coordinate_bin(row, episode.rows)]
    return f"x={x} y={y}"


def ask(rng: random.Random, episode: Episode, kind: str, shown: int | None = None) -> Question:
    """Draws a question of `kind` that the first `shown` frames answer (default: all frames).

    "return" asks for an element that an older frame shows and the current frame still has.

    Raises:
        ValueError: the kind is unknown.
    """
    frames = episode.frames[:shown]
    current = frames[-1]
    if kind == "click":
        name, cell = rng.choice(sorted(current.elements.items()))
        return Question(
            kind,
            current.step,
            f"click step {current.step} {' '.join(name)}",
            f"click ( {_where(episode, cell)} )",
        )
    frame = rng.choice(frames[:-1] or frames)
    if kind == "where":
        name, cell = rng.choice(sorted(frame.elements.items()))
        text = f"where step {frame.step} {' '.join(name)}"
        return Question(kind, frame.step, text, f"at ( {_where(episode, cell)} )")
    if kind == "what":
        name, cell = rng.choice(sorted(frame.elements.items()))
        text = f"what step {frame.step} {_where(episode, cell)}"
        return Question(kind, frame.step, text, f"it is {' '.join(name)} .")
    if kind == "return":
        return _ask_return(rng, episode, frame, current)
    raise ValueError(f"kind={kind!r}: expected one of {KINDS}")


def _ask_return(rng: random.Random, episode: Episode, frame: Frame, current: Frame) -> Question:
    still_there: list[Name] = sorted(frame.elements.keys() & current.elements.keys())
    moved = [n for n in still_there if frame.elements[n] != current.elements[n]]
    name = rng.choice(moved or still_there or sorted(current.elements))
    before = frame.elements.get(name)
    if before is None:  # no element of that frame is left, so ask about the current frame
        frame, before = current, current.elements[name]
    text = f"return step {frame.step} {_where(episode, before)} step {current.step}"
    reply = f"it is {' '.join(name)} at ( {_where(episode, current.elements[name])} )"
    return Question("return", frame.step, text, reply)
