"""Says which questions are asked: how many prompts, and of which kinds. All variants share them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from starkv_compile import OptionError

from ..agent.questions import KINDS
from ..agent.world import MAX_STEP
from ..demo.turns import Turn, trajectory_turns

ROWS = 16  # prompts of a batch; grid, number of frames and kind are the same, so is the length
FRAMES = (1, 2, 3, 5)
ASKINGS = ("reply", "again", "other")
"""reply: the answer to the prompt's own question, from its second token on, because the full cache
gives the first. again: the same question, asked once more after the compaction. other: a question
that came only after the compaction, one of each kind."""
PART = 5  # number of first and of last steps that have a column of their own
COLUMNS = ("reply", "again", *("other" for _ in KINDS))
"""How each question of a prompt is asked."""


class AnyDesign(Protocol):
    """Lists what every design of questions has."""

    @property
    def file(self) -> str:
        """Name of the file that holds its cells."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The parts that the printed table shows."""

    @property
    def prompts(self) -> int: ...

    @property
    def questions(self) -> int: ...

    @property
    def rounds(self) -> int:
        """Number of rounds in which a bench measures a cell."""

    def slices(self) -> dict[str, np.ndarray]:
        """Returns weights [prompts, questions of each] of the questions in each reported part."""


@dataclass(frozen=True)
class Design:
    """Has `prompts` prompts of held-out episodes, balanced over kinds and numbers of frames.

    Each prompt has one question before the compaction and `len(COLUMNS)` questions after it.
    """

    prompts: int
    seed: int = 0
    frames: tuple[int, ...] = FRAMES

    file = "cells.jsonl"
    shown = ("all", *ASKINGS)

    @classmethod
    def of(cls, questions: int, seed: int = 0, frames: tuple[int, ...] = FRAMES) -> Design:
        """Returns the smallest balanced design with at least `questions` questions.

        Raises:
            OptionError: `questions` is less than 1, or a number of frames is impossible.
        """
        if questions < 1:
            raise OptionError(f"questions={questions}: expected at least 1")
        if not frames or min(frames) < 1 or max(frames) > 10:
            raise OptionError(f"frames={frames}: expected 1 to 10 screenshots in a prompt")
        whole = ROWS * len(frames) * len(KINDS)
        rounds = -(-questions // (len(COLUMNS) * whole))
        return cls(rounds * whole, seed, tuple(frames))

    @property
    def questions(self) -> int:
        return self.prompts * len(COLUMNS)

    @property
    def rounds(self) -> int:
        """Number of rounds in which a bench measures a cell."""
        return len(self.batches())

    def batches(self) -> list[tuple[int, str]]:
        """Returns (number of frames, kind of question) of each batch of ROWS prompts."""
        n = len(self.frames)
        return [
            (self.frames[i % n], KINDS[i // n % len(KINDS)]) for i in range(self.prompts // ROWS)
        ]

    def slices(self) -> dict[str, np.ndarray]:
        """Returns weights [prompts, len(COLUMNS)] of the questions in each reported part.

        "all" gives the three ways of asking the same weight. A question needs the current frame,
        an older frame, or both. With a single frame it always needs the current one.
        """
        frames = np.repeat([f for f, _ in self.batches()], ROWS)[:, None]
        asked = np.repeat([k for _, k in self.batches()], ROWS)[:, None]
        asking = np.array(COLUMNS)[None]
        kind = np.where(asking == "other", np.array(("", "", *KINDS))[None], asked)
        need = np.select(
            [(kind == "click") | (frames == 1), kind == "return"], ["current", "both"], "older"
        )
        everything = np.ones(need.shape)
        weights = {"all": np.where(asking == "other", 1 / len(KINDS), 1.0) * everything}
        for way in ASKINGS:
            here = (asking == way) * everything
            weights[way] = here
            for part in ("current", "older", "both"):
                weights[f"{way}, {part} frame" + "s" * (part == "both")] = here * (need == part)
        for number in self.frames:
            weights[f"all, {number} frame" + "s" * (number > 1)] = weights["all"] * (
                frames == number
            )
        return {name: part for name, part in weights.items() if part.any()}


@dataclass(frozen=True)
class Trajectories:
    """Has `prompts` trajectories of `steps` turns. Sessions keep the newest `history` screenshots.

    Raises:
        OptionError: a number is less than 1, or `steps` more than the agent can count.
    """

    prompts: int = 50
    steps: int = 20
    history: int = 5
    seed: int = 0

    file = "trajectories.jsonl"
    shown = ("all", f"first {PART} steps", f"last {PART} steps")

    def __post_init__(self) -> None:
        for name in ("prompts", "steps", "history"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.steps > MAX_STEP:
            raise OptionError(f"steps={self.steps}: the agent can count to {MAX_STEP}")

    @property
    def questions(self) -> int:
        return self.prompts * self.steps

    @property
    def rounds(self) -> int:
        """Number of rounds in which a bench measures a cell."""
        return self.prompts

    def turns(self, number: int) -> list[Turn]:
        return trajectory_turns(self.steps, self.history, 1000 * self.seed + number)

    def slices(self) -> dict[str, np.ndarray]:
        """Returns weights [prompts, steps] of the questions in each reported part."""
        step = np.arange(self.steps)
        parts = {"all": step >= 0}
        parts |= {kind: step % len(KINDS) == i for i, kind in enumerate(KINDS)}
        parts[f"first {PART} steps"] = step < PART
        parts[f"last {PART} steps"] = step >= self.steps - PART
        return {
            name: np.tile(part.astype(float), (self.prompts, 1))
            for name, part in parts.items()
            if part.any()
        }
