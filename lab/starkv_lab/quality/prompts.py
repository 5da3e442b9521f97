"""Makes held-out screens and questions in the form that the agent reads."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..agent.batches import Screens, draw
from ..agent.questions import KINDS, Question, ask
from ..agent.vocabulary import AGENT, END, IMAGE, TOKEN_ID, USER, VISION_END, VISION_START
from ..agent.world import GRIDS, Cell, Episode, sample_episode
from .design import ROWS, Design


@dataclass(frozen=True)
class Continuation:
    """Holds what follows a prompt on its cache.

    ids: tokens [B, S]. The last `judged` of them are the right answer.
    """

    ids: torch.Tensor
    judged: int


@dataclass(frozen=True)
class Prompts:
    """Holds B prompts of the same length: all screens, then one question.

    input_ids: [B, L]. is_element: [B, L] bool, tokens that show an element. is_asked: [B, L] bool,
    tokens that the prompt's question needs. continuations: one for each of `design.COLUMNS`.
    """

    input_ids: torch.Tensor
    screens: Screens
    is_element: torch.Tensor
    is_asked: torch.Tensor
    continuations: tuple[Continuation, ...]

    @property
    def is_image(self) -> torch.Tensor:
        return self.input_ids == TOKEN_ID[IMAGE]


def make_prompts(design: Design, number: int) -> Prompts:
    """Makes batch `number` of a design. Training never draws these seeds."""
    frames, kind = design.batches()[number]
    rng = random.Random(f"quality-{design.seed}-{number}-{frames}-{kind}")
    episodes = _episodes(rng, frames)
    asked = [ask(rng, episode, kind) for episode in episodes]
    pairs = list(zip(episodes, asked, strict=True))
    others = [[_ask_other(rng, e, other, q) for e, q in pairs] for other in KINDS]
    screens = draw(episodes)
    input_ids = _ids([*_shown(e), *q.text.split(), AGENT] for e, q in pairs)
    is_image = input_ids == TOKEN_ID[IMAGE]
    is_asked = torch.zeros_like(is_image)
    is_element = is_asked.clone()
    is_element[is_image] = screens.cells[:, 0] > 0
    needed = [needed_cells(e, q) for e, q in pairs]
    is_asked[is_image] = torch.tensor(
        [place in cells for e, cells in zip(episodes, needed, strict=True) for place in _places(e)]
    )
    return Prompts(
        input_ids,
        screens,
        is_element,
        is_asked,
        (_reply(asked), _next_turn(asked), *(_next_turn(questions) for questions in others)),
    )


def needed_cells(episode: Episode, question: Question) -> set[tuple[int, Cell]]:
    """Returns (index of the frame, cell) of everything that the answer depends on."""
    words = question.text.split()
    steps = {int(step) for word, step in pairwise(words) if word == "step"}
    said = f"{question.text} {question.answer}"
    return {
        (i, cell)
        for i, frame in enumerate(episode.frames)
        if frame.step in steps
        for name, cell in frame.elements.items()
        if " ".join(name) in said
    }


def _episodes(rng: random.Random, frames: int) -> list[Episode]:
    """Draws ROWS episodes on one grid, each with at least two questions of every kind.

    Two frames between which a single element moved have only one question of the kind "return".
    """
    grid = rng.choice(GRIDS)
    episodes: list[Episode] = []
    while len(episodes) < ROWS:
        episode = sample_episode(rng, frames, grid)
        if len({ask(rng, episode, "return").text for _ in range(20)}) > 1:
            episodes.append(episode)
    return episodes


def _ask_other(rng: random.Random, episode: Episode, kind: str, first: Question) -> Question:
    while True:
        question = ask(rng, episode, kind)
        if question.text != first.text:
            return question


def _shown(episode: Episode) -> list[str]:
    words = [USER]
    for frame in episode.frames:
        image = [IMAGE] * (episode.rows * episode.columns)
        words += ["step", str(frame.step), VISION_START, *image, VISION_END]
    return words


def _places(episode: Episode) -> list[tuple[int, Cell]]:
    """Returns (index of the frame, cell) of each visual token, in reading order."""
    rows, columns = range(episode.rows), range(episode.columns)
    return [(i, (r, c)) for i in range(len(episode.frames)) for r in rows for c in columns]


def _reply(questions: Sequence[Question]) -> Continuation:
    ids = _ids([*q.answer.split(), END] for q in questions)
    return Continuation(ids, ids.shape[1] - 1)


def _next_turn(questions: Sequence[Question]) -> Continuation:
    """Makes a separate turn after an empty reply, because a reply would give answers away."""
    ids = _ids([END, USER, *q.text.split(), AGENT, *q.answer.split(), END] for q in questions)
    return Continuation(ids, len(questions[0].answer.split()) + 1)


def _ids(rows: Iterable[list[str]]) -> torch.Tensor:
    return torch.tensor([[TOKEN_ID[word] for word in row] for row in rows])
