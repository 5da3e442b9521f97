"""Which questions are put: how many prompts, of which kinds. The same for every variant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from starkv_compile import OptionError

from ..agent.questions import KINDS
from ..demo.turns import Turn, trajectory_turns

ROWS = 16  # prompts of a batch: one grid, one number of frames, one kind, so one length
FRAMES = (1, 2, 3, 5)
ASKINGS = ("reply", "again", "other")
"""reply: the prompt's own answer, from its second token on; the first one is the full cache's.
again: the same question, put once more to the compacted cache. other: a question it has not seen
when it was compacted, one of each kind."""
PART = 5  # steps at either end that are reported by themselves
COLUMNS = ("reply", "again", *("other" for _ in KINDS))
"""What each question of a prompt is."""


class AnyDesign(Protocol):
    """What every design of questions says of itself."""

    @property
    def file(self) -> str:
        """Where its cells are kept, in a folder."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The parts that a table for people has."""

    @property
    def prompts(self) -> int: ...

    @property
    def questions(self) -> int: ...

    @property
    def rounds(self) -> int:
        """How often a bench advances over a cell."""

    def slices(self) -> dict[str, np.ndarray]:
        """Weights [prompts, questions of each] of the questions in each part that is reported."""


@dataclass(frozen=True)
class Design:
    """`prompts` prompts of held-out episodes, the kinds and the numbers of frames balanced.

    Each asks one question before the compaction and is put `len(COLUMNS)` after it.
    """

    prompts: int
    seed: int = 0
    frames: tuple[int, ...] = FRAMES

    file = "cells.jsonl"
    shown = ("all", *ASKINGS)

    @classmethod
    def of(cls, questions: int, seed: int = 0, frames: tuple[int, ...] = FRAMES) -> Design:
        """The smallest balanced design with that many questions.

        Raises:
            OptionError: no questions, or an impossible number of frames.
        """
        if questions < 1:
            raise OptionError(f"questions={questions}: at least 1 is needed")
        if not frames or min(frames) < 1 or max(frames) > 10:
            raise OptionError(f"frames={frames}: 1 to 10 screenshots a prompt")
        whole = ROWS * len(frames) * len(KINDS)
        rounds = -(-questions // (len(COLUMNS) * whole))
        return cls(rounds * whole, seed, tuple(frames))

    @property
    def questions(self) -> int:
        return self.prompts * len(COLUMNS)

    @property
    def rounds(self) -> int:
        """How often a bench advances over a cell."""
        return len(self.batches())

    def batches(self) -> list[tuple[int, str]]:
        """(frames, kind of the question asked) of each batch of ROWS prompts."""
        n = len(self.frames)
        return [
            (self.frames[i % n], KINDS[i // n % len(KINDS)]) for i in range(self.prompts // ROWS)
        ]

    def slices(self) -> dict[str, np.ndarray]:
        """Weights [prompts, len(COLUMNS)] of the questions in each part that is reported.

        "all" gives the three ways of asking the same weight. A question's need is the current
        frame, an older one, or both; with a single frame it is always the current one.
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
    """`prompts` trajectories of `steps` turns; the newest `history` screenshots are remembered.

    Raises:
        OptionError: one of them is less than 1.
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
                raise OptionError(f"{name}={getattr(self, name)}: at least 1 is needed")

    @property
    def questions(self) -> int:
        return self.prompts * self.steps

    @property
    def rounds(self) -> int:
        """How often a bench advances over a cell."""
        return self.prompts

    def turns(self, number: int) -> list[Turn]:
        return trajectory_turns(self.steps, self.history, 1000 * self.seed + number)

    def slices(self) -> dict[str, np.ndarray]:
        """Weights [prompts, steps] of the questions in each part that is reported."""
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
