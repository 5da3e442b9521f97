"""Makes the turns of the demo, from a generated episode or from the user's screenshots."""

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

MAX_FRAMES = 8  # one column of the picture each; the demo agent was trained on up to 5
FOLLOW_UPS = ("where", "what")


@dataclass(frozen=True)
class Turn:
    """Holds one user turn: a screenshot with its step number, or neither, then a line of text.

    `question` holds the right answer where it is known.
    """

    text: str
    step: int | None = None
    image: Image.Image | None = None
    question: Question | None = None

    @property
    def content(self) -> list[dict[str, Any]]:
        """The turn in the form that `AgentSession.step` takes."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": self.text}]
        if self.image is None:
            return parts
        seen = {"type": "image", "image": self.image}
        return [{"type": "text", "text": f"step {self.step}"}, seen, *parts]


def episode_turns(frames: int, seed: int) -> list[Turn]:
    """Makes `frames` turns with a screenshot and a question, then two questions on older frames.

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
    """Makes `steps` turns: a screenshot each, and a question about the newest `history` of them."""
    rng = random.Random(f"trajectory-{seed}")
    episode, turns = sample_episode(rng, steps), []
    for i, frame in enumerate(episode.frames):
        shown = replace(episode, frames=episode.frames[max(0, i + 1 - history) : i + 1])
        question = ask(rng, shown, KINDS[i % len(KINDS)])
        turns.append(Turn(question.text, frame.step, screenshot(episode, i), question))
    return turns


def generated_episode(frames: int, seed: int) -> tuple[Episode, random.Random]:
    """Returns the episode of `episode_turns`, and the generator that draws its questions.

    Raises:
        StarKVError: `frames` is out of range.
    """
    if not 1 <= frames <= MAX_FRAMES:
        raise StarKVError(f"frames={frames}: expected 1 to {MAX_FRAMES} screenshots")
    rng = random.Random(f"demo-{seed}")
    return sample_episode(rng, frames), rng


def image_turns(paths: Sequence[Path], question: str | None = None) -> list[Turn]:
    """Makes one turn for each picture file. The default question asks what is in the middle.

    Raises:
        StarKVError: a file is missing or is no image, or the agent does not know a word.
    """
    if len(paths) > MAX_FRAMES:
        raise StarKVError(f"{len(paths)} images: expected 1 to {MAX_FRAMES}")
    if question is not None:
        _check_words(question)
    return [
        Turn(question or f"what step {step} x=500 y=500", step, open_screenshot(path))
        for step, path in enumerate(paths, start=1)
    ]


def open_screenshot(path: Path) -> Image.Image:
    """Reads a picture file, upright and in RGB.

    Raises:
        StarKVError: the file is missing or is no image, or its picture is too narrow for a
            processor.
    """
    if not path.is_file():
        raise StarKVError(f"{path}: there is no such file; give the path of a picture")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise StarKVError(
            f"{path}: not an image that can be read ({error}); give a PNG or JPEG file"
        ) from error
    long, short = max(image.size), min(image.size)
    if long > 20 * short:
        width, height = image.size
        raise StarKVError(
            f"{path}: {width} x {height} pixels; the long side of a screenshot may be at most 20 "
            "times the short side"
        )
    return image


def _check_words(question: str) -> None:
    forbidden = {*SPECIAL_TOKENS, UNKNOWN}
    words = question.split()
    unknown = [word for word in words if word not in TOKEN_ID or word in forbidden]
    if unknown or not words:
        raise StarKVError(
            f"question {question!r}: the agent does not know {', '.join(unknown) or 'silence'}; "
            "ask in one of its forms: 'click step 1 red star', 'where step 1 button save' or "
            "'what step 1 x=500 y=500' (coordinates are 20, 60, ... 980)"
        )
