"""Reads easy-VQA, whose images and questions come from others (Victor Zhou, MIT, PyPI `easy-vqa`).

It has 4,000 training and 1,000 test images of 64 x 64 pixels. Each shows one coloured shape on a
pale background, and has about ten questions with 13 possible answers of one word.
"""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from starkv_lab.agent.batches import IGNORE, Dialogues, Screens
from starkv_lab.agent.vocabulary import (
    AGENT,
    END,
    IMAGE,
    PAD,
    SPECIAL_TOKENS,
    USER,
    VISION_END,
    VISION_START,
)

PATCH, SIDE = 4, 16  # pixels of a visual token, tokens of an image's side

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
WORDS = (
    "a",
    "color",
    "contain",
    "does",
    "image",
    "in",
    "is",
    "no",
    "not",
    "of",
    "present",
    "shape",
    "the",
    "there",
    "what",
    "yes",
    *SHAPES,
    *COLORS,
)
IDS = {word: i for i, word in enumerate((*SPECIAL_TOKENS, *WORDS))}  # with the agent's specials


class Question(NamedTuple):
    """Holds the token ids of a question and of its answer."""

    text: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Split:
    """Holds images and their questions.

    pixels: [images, SIDE ** 2, 3 * PATCH ** 2], the patches in reading order, each channel by
    channel, with values from -1 to 1. questions: the questions of each image, all different.
    """

    pixels: torch.Tensor
    questions: list[list[Question]]

    def screens(self, images: Sequence[int]) -> Screens:
        """Returns the model's input. cells [tokens, 1] are 1 where a token shows a shape."""
        pixels = self.pixels[list(images)]
        ground = pixels.median(1, keepdim=True).values
        shape = ((pixels - ground).abs().amax(-1) > 0.1).long()
        grid = torch.tensor([[1, SIDE, SIDE]] * len(images))
        return Screens(pixels.flatten(0, 1), grid, shape.view(-1, 1))


@functools.cache
def load_split(name: str) -> Split:
    """Loads the "train" or "test" split in the order of its image numbers.

    Raises:
        SystemExit: the package easy-vqa is not installed.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise SystemExit("easy-VQA is not installed: pip install easy-vqa") from error
    paths = getattr(easy_vqa, f"get_{name}_image_paths")()
    asked: defaultdict[int, list[Question]] = defaultdict(list)
    for text, answer, image in zip(*getattr(easy_vqa, f"get_{name}_questions")(), strict=True):
        words = text.lower().replace("?", "").split()
        question = Question(tuple(IDS[word] for word in words), IDS[answer])
        if question not in asked[image]:
            asked[image].append(question)
    numbers = sorted(paths)
    pixels = torch.stack([read_patches(Path(paths[number])) for number in numbers])
    return Split(pixels, [asked[number] for number in numbers])


def read_patches(path: Path) -> torch.Tensor:
    """Reads an image file as patches [SIDE ** 2, 3 * PATCH ** 2]."""
    from PIL import Image

    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).float() / 127.5 - 1
    cut = pixels.view(SIDE, PATCH, SIDE, PATCH, 3).permute(0, 2, 4, 1, 3)
    return cut.reshape(SIDE * SIDE, -1)


def opening(question: Question) -> list[int]:
    """Returns the tokens of an image and a first question, up to the answer."""
    image = [IDS[VISION_START], *[IDS[IMAGE]] * SIDE**2, IDS[VISION_END]]
    return [IDS[USER], *image, *question.text, IDS[AGENT]]


def turn(question: Question) -> list[int]:
    """Returns the tokens of a later question, after a reply or after none."""
    return [IDS[END], IDS[USER], *question.text, IDS[AGENT]]


def fill(rows: Sequence[Sequence[int]], filler: int = IDS[PAD]) -> torch.Tensor:
    """Pads rows on the right to [rows, longest]. A causal model never sees the padding."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows])


def sample_dialogues(
    rng: random.Random, split: Split, rows: int, questions: int, silent: float
) -> tuple[Screens, Dialogues]:
    """Draws `rows` training images with up to `questions` questions about each.

    silent: share of answers that are left out, as before a question on a compacted cache.
    """
    images = rng.sample(range(len(split.questions)), rows)
    texts, labels = [], []
    for image in images:
        asked = split.questions[image]
        text: list[int] = []
        label: list[int] = []
        for question in rng.sample(asked, min(questions, len(asked))):
            text += turn(question) if text else opening(question)
            label += [IGNORE] * (len(text) - len(label) - 1) + [question.answer]
            if rng.random() >= silent:
                text.append(question.answer)
                label.append(IGNORE)
        texts.append(text)
        labels.append(label)
    return split.screens(images), Dialogues(fill(texts), fill(labels, IGNORE))
