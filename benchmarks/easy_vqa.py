"""Measures how well compressed caches answer easy-VQA.

    pip install easy-vqa
    python -m benchmarks.easy_vqa --out DIR

The first run trains a tiny model on the training split and saves it in DIR, in twenty minutes on
one core. The model gets a test image and a question. A policy compacts the cache, at equal bytes
for all policies. Then the model answers all questions that easy-VQA has about that image, one at a
time: the same question *again*, and the *others*, which come only after the compaction. A second
run continues after an interruption.
"""

from __future__ import annotations

import argparse
import functools
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from starkv_lab.agent.vocabulary import IMAGE
from starkv_lab.quality.arguments import names
from starkv_lab.quality.cells import Cell
from starkv_lab.quality.command import BenchOptions, chosen, run_cells
from starkv_lab.quality.prompts import Prompts
from starkv_lab.quality.readers import Reader, Seen
from starkv_lab.quality.variants import Variant

from starkv_compile.cli import shares_of
from starkv_compile.errors import OptionError

from .easy_vqa_data import (
    COLORS,
    IDS,
    SHAPES,
    Question,
    Split,
    fill,
    load_split,
    opening,
    turn,
)
from .easy_vqa_model import load_or_train

ROWS = 32  # most images of a batch; their first questions have the same length
KINDS = ("yes or no", "shape", "colour")


@dataclass(frozen=True)
class EasyVqa:
    """Takes the first `prompts` test images with all their questions.

    `seed` draws the question that comes before the compaction.

    Raises:
        OptionError: the test split does not have so many images.
    """

    prompts: int = 500
    seed: int = 0

    file = "easy_vqa.jsonl"
    shown = ("all", "again", "other", *KINDS)

    def __post_init__(self) -> None:
        most = len(load_split("test").questions)
        if not 1 <= self.prompts <= most:
            raise OptionError(
                f"images={self.prompts}: expected 1 to {most}, the images of the test split"
            )

    def ordered(self) -> list[list[Question]]:
        """Returns the questions of each image. The first one comes before the compaction."""
        asked = load_split("test").questions[: self.prompts]
        return [
            random.Random(f"easy-vqa-test-{self.seed}-{image}").sample(questions, len(questions))
            for image, questions in enumerate(asked)
        ]

    def batches(self) -> list[list[int]]:
        """Returns the numbers of the images of each batch."""
        by_length = defaultdict(list)
        for image, questions in enumerate(self.ordered()):
            by_length[len(questions[0].text)].append(image)
        return [
            images[start : start + ROWS]
            for _, images in sorted(by_length.items())
            for start in range(0, len(images), ROWS)
        ]

    @property
    def questions(self) -> int:
        return sum(map(len, self.ordered()))

    @property
    def rounds(self) -> int:
        return len(self.batches())

    def slices(self) -> dict[str, np.ndarray]:
        """Returns equal weights of the questions, with prompts in the order of `batches`."""
        ordered = self.ordered()
        kinds = np.full((self.prompts, max(map(len, ordered))), -1)
        for row, image in enumerate(i for images in self.batches() for i in images):
            kinds[row, : len(ordered[image])] = [_kind(q) for q in ordered[image]]
        there, first = kinds >= 0, np.arange(kinds.shape[1]) == 0
        parts = {"all": there, "again": there & first, "other": there & ~first}
        parts |= {name: kinds == i for i, name in enumerate(KINDS)}
        return {name: part.astype(float) for name, part in parts.items()}


def _kind(question: Question) -> int:
    """Returns the question's index in KINDS."""
    word = list(IDS)[question.answer]
    return 1 if word in SHAPES else 2 if word in COLORS else 0


@dataclass(frozen=True)
class Asked:
    """Holds one question for each row of a batch, after its prompt.

    ids: [B, S], padded on the right. last: [B], the index of the token that answers. answer: [B],
    the right answer. there: [B], whether the row has that question.
    """

    ids: torch.Tensor
    last: torch.Tensor
    answer: torch.Tensor
    there: torch.Tensor


class EasyVqaBench:
    """Answers all prompts of a design from the full cache."""

    def __init__(self, design: EasyVqa, models: tuple[Any, Any], advance: Callable[[], Any]):
        self.reader, split, ordered = Reader(*models), load_split("test"), design.ordered()
        self.columns = max(map(len, ordered))
        self.batches: list[tuple[Seen, list[Asked]]] = []
        self.chosen: list[np.ndarray] = []
        for images in design.batches():
            questions = [ordered[image] for image in images]
            seen = self.reader.see(make_prompts(split, images, questions))
            asked = [make_asked(questions, i) for i in range(self.columns)]
            self.batches.append((seen, asked))
            self.chosen.append(self._answers(self.reader.read(seen), seen, asked))
            advance()

    def _answers(self, cache: Any, seen: Seen, asked: list[Asked]) -> np.ndarray:
        """Returns the chosen words [B, columns]."""
        columns = []
        for one in asked:
            logits = self.reader.put(cache, seen, one.ids)
            columns.append(logits[torch.arange(len(one.last)), one.last].argmax(-1))
        return torch.stack(columns, 1).numpy()

    def measure(
        self, variant: Variant, budget: float, advance: Callable[[], Any] = lambda: None
    ) -> Cell:
        """Measures the cell of `variant` at `budget`.

        An answer is one token. The cell does not record its attention and its distribution.
        """
        right, same = [], []
        with self.reader.reading(variant, budget, self.batches[0][0]) as metered:
            for (seen, asked), full in zip(self.batches, self.chosen, strict=True):
                said = self._answers(metered.read(seen), seen, asked)
                answers = torch.stack([one.answer for one in asked], 1).numpy()
                there = torch.stack([one.there for one in asked], 1).numpy()
                right.append((said == answers) & there)
                same.append((said == full) | ~there)
                advance()
        return Cell(
            variant=variant.name,
            budget=budget,
            options=variant.config(budget).describe(),
            right=np.concatenate(right),
            same=np.concatenate(same),
            kl={},
            recall=float("nan"),
            nbytes=metered.nbytes,
            full_nbytes=metered.full_nbytes,
            seconds=metered.seconds,
        )


def make_prompts(split: Split, images: list[int], questions: list[list[Question]]) -> Prompts:
    """Makes prompts of images with their first questions. An oracle keeps the shape."""
    screens = split.screens(images)
    input_ids = torch.tensor([opening(asked[0]) for asked in questions])
    shape = torch.zeros_like(input_ids, dtype=torch.bool)
    shape[input_ids == IDS[IMAGE]] = screens.cells[:, 0] > 0
    return Prompts(input_ids, screens, shape, shape, ())


def make_asked(questions: list[list[Question]], number: int) -> Asked:
    """Takes question `number` of each row. A row with fewer repeats its first, uncounted."""
    there = [number < len(asked) for asked in questions]
    put = [asked[number if i else 0] for asked, i in zip(questions, there, strict=True)]
    rows = [turn(question) for question in put]
    return Asked(
        fill(rows),
        torch.tensor([len(row) - 1 for row in rows]),
        torch.tensor([question.answer for question in put]),
        torch.tensor(there),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--policies", type=names, metavar="A,B", default="policy", help="as in `bench quality`")
    add(
        "--budgets",
        metavar="P,Q",
        default="40%,20%,10%,5%",
        help="shares of the tokens: 0.2 or 20%%",
    )
    add("--images", type=int, metavar="N", default=500, help="number of test images, at most 1,000")
    add("--seed", type=int, default=0, help="seed of the model and of the first questions")
    add("--threads", type=int, default=1)
    add("--out", type=Path, metavar="DIR", default=Path("bench-easy-vqa"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    design = EasyVqa(args.images, args.seed)
    options = BenchOptions(
        policies=args.policies, budgets=shares_of(args.budgets), threads=args.threads, out=args.out
    )
    variants = chosen(options.policies)
    folder = args.out / f"model-{args.seed}"
    bench = functools.partial(EasyVqaBench, design, load_or_train(folder, args.seed))
    run_cells(options, design, folder, variants, bench, "easy_vqa.csv")


if __name__ == "__main__":
    main()
