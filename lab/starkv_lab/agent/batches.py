"""Turns episodes into tokens and pixels, for training and evaluation.

All rows of a batch share grid, number of frames and kinds of questions. So they have the same
length and the same positions, and need no padding.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .architecture import IMAGE_MEAN, IMAGE_STD
from .questions import KINDS, ask
from .render import CELL, screenshot
from .vocabulary import (
    AGENT,
    ATTRIBUTES,
    END,
    IMAGE,
    NOUNS,
    TOKEN_ID,
    USER,
    VISION_END,
    VISION_START,
    coordinate_bin,
)
from .world import GRIDS, Episode, sample_episode

IGNORE = -100
Plan = tuple[int | str, ...]  # indices of frames and kinds of questions


@dataclass(frozen=True)
class Screens:
    """Holds B episodes of F frames with n visual tokens each.

    pixel_values: [B*F*n, 3*32*32]. grid_thw: [B*F, 3]. cells: [B*F*n, 4], the class indices of
    attribute, noun, x bin and y bin of each visual token; attribute and noun are 0 where the cell
    has no element.
    """

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    cells: torch.Tensor


@dataclass(frozen=True)
class Dialogues:
    """Holds B rows of L tokens: frames (as placeholders), questions and answers.

    input_ids: [B, L]. labels: [B, L], the next token where it is part of an answer, else IGNORE.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor

    @property
    def is_image(self) -> torch.Tensor:
        """[B, L] bool: True at visual tokens. All rows are the same."""
        return self.input_ids == TOKEN_ID[IMAGE]


def sample_plan(rng: random.Random, frames: int, questions: int, at_end: bool = False) -> Plan:
    """Draws a plan of frames in their order and of questions.

    Up to two questions follow each frame but the last. All others come at the end.

    Args:
        at_end: puts all questions after the last frame.
    """
    plan: list[int | str] = []
    left = questions
    for i in range(frames):
        plan.append(i)
        here = left if i == frames - 1 else 0 if at_end else rng.choice((0, 0, 1, 2))
        here = min(here, left)
        left -= here
        plan += [rng.choice(KINDS) for _ in range(here)]
    return tuple(plan)


def sample_episodes(
    rng: random.Random, rows: int, frames: int, elements: int = 12
) -> list[Episode]:
    """Draws `rows` episodes on one random grid."""
    grid = rng.choice(GRIDS)
    return [sample_episode(rng, frames, grid, elements=elements) for _ in range(rows)]


def draw(episodes: Sequence[Episode]) -> Screens:
    """Draws all frames of `episodes`, which share grid and number of frames."""
    frames, grid = len(episodes[0].frames), (episodes[0].rows, episodes[0].columns)
    pixels = np.stack([np.asarray(screenshot(e, i)) for e in episodes for i in range(frames)])
    return Screens(
        pixel_values=patchify(pixels),
        grid_thw=torch.tensor([[1, *grid]] * len(pixels)),
        cells=torch.from_numpy(np.concatenate([_cell_classes(e) for e in episodes])),
    )


def write(rng: random.Random, episodes: Sequence[Episode], plan: Plan) -> Dialogues:
    """Writes questions of the plan's kinds about each of `episodes`, with their answers."""
    rows = [_lay_out(rng, episode, plan) for episode in episodes]
    input_ids, labels = (torch.tensor(part) for part in zip(*rows, strict=True))
    return Dialogues(input_ids, labels)


def _lay_out(rng: random.Random, episode: Episode, plan: Plan) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []

    def add(*words: str, answer: bool = False) -> None:
        tokens = [TOKEN_ID[w] for w in words]
        if answer:  # position i predicts token i + 1
            labels[-1] = tokens[0]
        ids.extend(tokens)
        labels.extend((*tokens[1:], IGNORE) if answer else (IGNORE,) * len(tokens))

    shown, user_spoke = 0, False
    for item in plan:
        if not user_spoke:
            add(USER)
            user_spoke = True
        if isinstance(item, int):
            shown = item + 1
            add("step", str(episode.frames[item].step), VISION_START)
            add(*[IMAGE] * (episode.rows * episode.columns))
            add(VISION_END)
        else:
            question = ask(rng, episode, item, shown)
            add(*question.text.split(), AGENT)
            add(*question.answer.split(), END, answer=True)
            user_spoke = False
    return ids, labels


def _cell_classes(episode: Episode) -> np.ndarray:
    """Returns [F*n, 4] int64: attribute, noun (0 = none), x bin, y bin of each visual token."""
    shape = (len(episode.frames), episode.rows, episode.columns)
    classes = np.zeros((*shape, 4), np.int64)
    for i, frame in enumerate(episode.frames):
        for (attribute, noun), (row, column) in frame.elements.items():
            classes[i, row, column, 0] = 1 + ATTRIBUTES.index(attribute)
            classes[i, row, column, 1] = 1 + NOUNS.index(noun)
    classes[..., 2] = [coordinate_bin(c, episode.columns) for c in range(episode.columns)]
    classes[..., 3] = np.array([coordinate_bin(r, episode.rows) for r in range(episode.rows)])[
        :, None
    ]
    return classes.reshape(-1, 4)


def patchify(pixels: np.ndarray) -> torch.Tensor:
    """Cuts [N, rows*32, columns*32, 3] uint8 into patches [N*rows*columns, 3*32*32] float32.

    The result equals the image processor's for images that need no resizing, and a test compares
    the two. The function avoids the processor's cost per image.
    """
    n, height, width, channels = pixels.shape
    cells = pixels.reshape(n, height // CELL, CELL, width // CELL, CELL, channels)
    flat = cells.transpose(0, 1, 3, 5, 2, 4).reshape(-1, channels * CELL * CELL)
    mean, std = IMAGE_MEAN[0], IMAGE_STD[0]
    return torch.from_numpy(flat.astype(np.float32)).div_(255).sub_(mean).div_(std)
