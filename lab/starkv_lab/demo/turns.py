"""What the demo puts to the agent: a generated episode, or a person's own screenshots."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from starkv_compile import StarKVError

from ..agent.questions import KINDS, Question, ask
from ..agent.render import screenshot
from ..agent.vocabulary import SPECIAL_TOKENS, TOKEN_ID, UNKNOWN
from ..agent.world import Episode, sample_episode

MAX_FRAMES = 8  # one column of the picture each; the shipped agent was trained on up to 5
FOLLOW_UPS = ("where", "what")


@dataclass(frozen=True)
class Turn:
    """One user turn: a screenshot with its step number, or neither; then a line of text.

    `question` holds the right answer, where there is one.
    """

    text: str
    step: int | None = None
    image: Image.Image | None = None
    question: Question | None = None

    @property
    def content(self) -> list[dict[str, Any]]:
        """As `AgentSession.step` takes it."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": self.text}]
        if self.image is None:
            return parts
        seen = {"type": "image", "image": self.image}
        return [{"type": "text", "text": f"step {self.step}"}, seen, *parts]


def episode_turns(frames: int, seed: int) -> list[Turn]:
    """`frames` new screenshots with one question each, then two about older frames.

    Raises:
        StarKVError: `frames` is out of range.
    """
    episode, rng = generated_episode(frames, seed)
    turns = []
    for i, frame in enumerate(episode.frames):
        question = ask(rng, episode, KINDS[i % len(KINDS)], i + 1)
        turns.append(Turn(question.text, frame.step, screenshot(episode, i), question))
    follow_ups = [ask(rng, episode, kind) for kind in FOLLOW_UPS]
    return turns + [Turn(question.text, question=question) for question in follow_ups]


def trajectory_turns(steps: int, history: int, seed: int) -> list[Turn]:
    """`steps` screenshots, with each a question about the newest `history`; all kinds in turn."""
    rng = random.Random(f"trajectory-{seed}")
    episode, turns = sample_episode(rng, steps), []
    for i, frame in enumerate(episode.frames):
        shown = replace(episode, frames=episode.frames[max(0, i + 1 - history) : i + 1])
        question = ask(rng, shown, KINDS[i % len(KINDS)])
        turns.append(Turn(question.text, frame.step, screenshot(episode, i), question))
    return turns


def generated_episode(frames: int, seed: int) -> tuple[Episode, random.Random]:
    """The episode of `episode_turns`, and what draws its questions.

    Raises:
        StarKVError: `frames` is out of range.
    """
    if not 1 <= frames <= MAX_FRAMES:
        raise StarKVError(f"frames={frames}: the agent is shown 1 to {MAX_FRAMES} screenshots")
    rng = random.Random(f"demo-{seed}")
    return sample_episode(rng, frames), rng


def image_turns(paths: Sequence[Path], question: str | None = None) -> list[Turn]:
    """One turn a picture file, in order; by default the question is what is in its middle.

    Raises:
        StarKVError: a file is missing or no image, or a word is not the agent's.
    """
    if len(paths) > MAX_FRAMES:
        raise StarKVError(f"{len(paths)} images: the agent is shown 1 to {MAX_FRAMES}")
    if question is not None:
        _check_words(question)
    return [
        Turn(question or f"what step {step} x=500 y=500", step, open_screenshot(path))
        for step, path in enumerate(paths, start=1)
    ]


def open_screenshot(path: Path) -> Image.Image:
    """The picture in a file, upright and in RGB.

    Raises:
        StarKVError: it is missing, no image, or so narrow that a processor refuses it.
    """
    if not path.is_file():
        raise StarKVError(f"{path}: there is no such file")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise StarKVError(f"{path}: not an image that can be read ({error})") from error
    long, short = max(image.size), min(image.size)
    if long > 20 * short:
        width, height = image.size
        raise StarKVError(
            f"{path}: {width} x {height} pixels; a screenshot's sides differ at most 20-fold"
        )
    return image


def _check_words(question: str) -> None:
    forbidden = {*SPECIAL_TOKENS, UNKNOWN}
    words = question.split()
    unknown = [word for word in words if word not in TOKEN_ID or word in forbidden]
    if unknown or not words:
        raise StarKVError(
            f"question {question!r}: the agent does not know {', '.join(unknown) or 'silence'}; "
            "it was taught forms such as 'click step 1 red star', 'where step 1 button save' and "
            "'what step 1 x=500 y=500' (coordinates 20, 60, ... 980)"
        )
