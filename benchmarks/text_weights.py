"""Measures needles in text, and continuations of real text, on real weights.

    python -m benchmarks.text_weights --model gemma3 --prompts 96
    python -m benchmarks.text_weights --policies default snapkv tova

A text of about 900 tokens has six door codes, one in each sixth of it. A question asks for one
code. A second question asks for another one, on the cache after the first reply. An answer is right
if it holds the code. The continuations come from Python's reference manual. All budgets use the
same prompts and passages. Shares come with 95 % intervals (Wilson), and losses with the 95 %
interval of their difference to the full cache.

Layers with a sliding window stay uncompressed. Of Gemma 3's 18 layers, 3 see further than 512
tokens, and the budget applies to these. Bytes are those of all layers' caches.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from starkv_lab.statistics import wilson

import starkv_compile
from starkv_compile import StarKVCache, StarKVConfig
from starkv_compile.policies import POLICIES

from .text_models import TEXT_MODELS, load_text_model
from .text_tasks import (
    ROOMS,
    Needles,
    continuation_loss,
    converse,
    follow_up_ids,
    passages,
    prompt_ids,
    read,
)

BUDGETS = (0.5, 0.2, 0.1)  # in addition to the full cache
CONTEXT, REST = 768, 64  # tokens of a passage in the cache, and tokens with a loss


@dataclass(frozen=True)
class Answered:
    """Holds the answers to one prompt in one configuration.

    depth: the sixth of the text that holds the code, counted from 0.
    """

    seed: int
    depth: int
    code: str
    replies: tuple[str, str | None]
    right: tuple[bool, bool]
    nbytes: int


@dataclass(frozen=True)
class Row:
    """Holds one configuration's answers, and its loss in nats per token for each passage."""

    policy: str
    budget: float
    answers: list[Answered]
    losses: list[float]


@dataclass(frozen=True)
class Prompted:
    """Holds a prompt that is read once for all configurations, or by each one in chunks."""

    needles: Needles
    ids: torch.Tensor
    follow_up: torch.Tensor
    past: StarKVCache | None


NAMES: dict[str, Callable[..., StarKVConfig]] = {
    "default": StarKVConfig,
    "paper": StarKVConfig.paper,
    **{name: functools.partial(StarKVConfig, policy=name) for name in POLICIES},
}


def configurations(
    window: int, names: Sequence[str], nbits: int
) -> Iterator[tuple[str, StarKVConfig]]:
    """Yields the full cache once, then every policy at every budget."""
    yield "full", StarKVConfig(budget=1.0, window=window, inner="eager")
    for name in names:
        for budget in BUDGETS:
            yield name, NAMES[name](budget=budget, window=window, nbits=nbits, inner="eager")


def measure(
    model: Any,
    tokenizer: Any,
    prompts: int,
    texts: int,
    window: int,
    opened: bool,
    names: Sequence[str],
    chunk: int | None = None,
    nbits: int = 16,
) -> Iterator[Row]:
    """Yields a row for each configuration. Every text is read once, before the compilation.

    chunk: None, or the tokens of each part of a text. Then each configuration reads it for itself.
    """
    asked = [Needles.of(seed) for seed in range(prompts)]
    ready = []
    for needles in track(asked, "reading prompts"):
        ids = prompt_ids(tokenizer, needles, opened)
        follow_up = follow_up_ids(tokenizer, needles, opened)
        past = None if chunk else read(model, ids)
        ready.append(Prompted(needles, ids, follow_up, past))
    pieces = []
    for text in track(passages()[:texts], "reading passages"):
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : CONTEXT + REST]
        pieces.append((ids, None if chunk else read(model, ids[:, :CONTEXT])))
    for policy, config in configurations(window, names, nbits):
        name = f"{policy} {config.budget:.0%}"
        torch._dynamo.reset()  # lets go of the last configuration's graphs
        starkv_compile.compile(model, config)
        answers = [
            _ask(model, tokenizer, p, p.past or read(model, p.ids, chunk), opened)
            for p in track(ready, f"{name}: needles")
        ]
        losses = [
            continuation_loss(model, ids, past or read(model, ids[:, :CONTEXT], chunk), CONTEXT)
            for ids, past in track(pieces, f"{name}: passages")
        ]
        starkv_compile.undo(model)
        yield Row(policy, config.budget, answers, losses)


def _ask(model: Any, tokenizer: Any, prompt: Prompted, past: StarKVCache, opened: bool) -> Answered:
    needles = prompt.needles
    tokens = 7 if opened else 24  # an answer without its opening repeats the question first
    said = converse(model, tokenizer, prompt.ids, prompt.follow_up, past, tokens)
    codes = needles.code(0), needles.code(1)
    right = codes[0] in said.replies[0], codes[1] in (said.replies[1] or "")
    seed = needles.seed
    return Answered(seed, needles.asked[0], codes[0], said.replies, right, said.nbytes)


def _share(right: Sequence[bool]) -> str:
    low, high = wilson(sum(right), len(right))
    return f"{sum(right)}/{len(right)}: {sum(right) / len(right):.0%} ({low:.0%} to {high:.0%})"


def _loss(losses: Sequence[float], full: Sequence[float]) -> str:
    more = [a - b for a, b in zip(losses, full, strict=True)]
    if len(more) < 2 or losses is full:
        return f"{statistics.fmean(losses):.3f}"
    half = 1.96 * statistics.stdev(more) / len(more) ** 0.5
    return f"{statistics.fmean(losses):.3f} ({statistics.fmean(more):+.3f} +- {half:.3f})"


def tables(title: str, rows: Sequence[Row]) -> Iterator[Table]:
    """Makes a table of all rows, and one of the first answers by the code's place in the text."""
    full = rows[0]
    table = Table(
        "policy", "budget", "codes found", "follow-up", "nats per token", "cache", title=title
    )
    for row in rows:
        nbytes = statistics.fmean(a.nbytes for a in row.answers)
        table.add_row(
            row.policy,
            f"{row.budget:.0%}",
            _share([a.right[0] for a in row.answers]),
            "ends at one prompt"
            if row.answers[0].replies[1] is None
            else _share([a.right[1] for a in row.answers]),
            _loss(row.losses, full.losses),
            f"{nbytes / 2**20:.1f} MiB",
        )
    yield table
    depths = [f"sixth {i + 1}" for i in range(len(ROOMS))]
    table = Table("policy", "budget", *depths, title="codes found, by place in the text")
    for row in rows:
        cells = []
        for depth in range(len(ROOMS)):
            right = [a.right[0] for a in row.answers if a.depth == depth]
            cells.append(f"{sum(right)}/{len(right)}")
        table.add_row(row.policy, f"{row.budget:.0%}", *cells)
    yield table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=TEXT_MODELS, default="smollm2")
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=NAMES,
        metavar="NAME",
        default=["default", "paper"],
        help=f"names from {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--prompts", type=int, default=96, help="number of prompts, a multiple of six"
    )
    parser.add_argument("--passages", type=int, default=32, help="number of passages")
    parser.add_argument("--window", type=int, default=StarKVConfig().window)
    parser.add_argument(
        "--unopened",
        action="store_true",
        help="leave out the beginning of the answer, so that the window has the chat template's "
        "last tokens and the end of the question",
    )
    parser.add_argument(
        "--chunk",
        type=int,
        metavar="N",
        help="read texts N tokens at a time, compacting after each",
    )
    parser.add_argument(
        "--nbits", type=int, choices=(16, 8, 4), default=16, help="bits of the kept tokens"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file for every prompt's answers, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.monotonic()
    model, tokenizer = load_text_model(args.model)
    rows = []
    for row in measure(
        model,
        tokenizer,
        args.prompts,
        args.passages,
        args.window,
        not args.unopened,
        args.policies,
        args.chunk,
        args.nbits,
    ):
        rows.append(row)
        if args.out:
            args.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    in_chunks = f", in chunks of {args.chunk} tokens" if args.chunk else ""
    bits = f", {args.nbits} bits" if args.nbits != 16 else ""
    title = f"{TEXT_MODELS[args.model].title}, window {args.window}{in_chunks}{bits}"
    console = Console()
    for table in tables(title, rows):
        console.print(table)
    console.print(f"This took {time.monotonic() - began:.0f} s with {args.threads} threads.")


if __name__ == "__main__":
    main()
