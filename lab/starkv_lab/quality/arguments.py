"""Reads the command lines of `bench quality`, `trajectories` and `plot`. Imports no torch."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from starkv_compile.cli import importing, shares_of


def add_quality(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    quality = kinds.add_parser(
        "quality",
        help="compare policies and options on the demo agent, at equal bytes",
        description="Gives the demo agent held-out screens and a question, compacts the cache, "
        "and asks that question and others again. DIR/cells.jsonl gets one line for each policy "
        "and budget. A second run skips the lines that are there, so it continues after an "
        "interruption.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_common(quality, budgets="40%,20%,10%,5%,3%")
    add = quality.add_argument
    add(
        "--questions",
        type=int,
        metavar="N",
        default=2000,
        help="fewest questions for each policy and budget",
    )
    add(
        "--frames",
        type=numbers,
        metavar="N,M",
        default="1,2,3,5",
        help="numbers of screenshots in a prompt",
    )
    quality.set_defaults(run=_quality)


def add_trajectories(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    trajectories = kinds.add_parser(
        "trajectories",
        help="compare policies over many steps on one cache",
        description="Shows the demo agent a screenshot and asks a question at every step. All "
        "steps use one cache, which each step compacts. DIR/trajectories.jsonl gets one line for "
        "each policy and budget. A second run skips the lines that are there.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_common(trajectories, budgets="40%,20%,10%")
    add = trajectories.add_argument
    add("--trajectories", type=int, metavar="N", default=50, help="number of trajectories")
    add("--steps", type=int, metavar="N", default=20, help="steps of each trajectory")
    add("--history", type=int, metavar="N", default=5, help="screenshots that the session keeps")
    trajectories.set_defaults(run=_trajectories)


def _add_common(parser: argparse.ArgumentParser, budgets: str) -> None:
    add = parser.add_argument
    add(
        "--policies",
        type=names,
        metavar="A,B",
        default="policy,ablation,own",
        help="names from starkv_lab.quality.variants; 'policy', 'ablation', 'own', 'chunks' "
        "or 'bits' means all variants of that group",
    )
    add(
        "--budgets",
        metavar="P,Q",
        default=budgets,
        help="shares of the tokens seen that stay cached: 0.2 or 20%%",
    )
    add("--seed", type=int, default=0, help="seed of screens and questions")
    add("--threads", type=int, default=1, help="threads of torch")
    add(
        "--agent",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="checkpoint folder of the agent (default: the demo agent)",
    )
    add("--out", type=Path, metavar="DIR", default=Path("bench-quality"), help="output folder")


def _quality(args: argparse.Namespace) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    importing()
    from .command import QualityOptions, run_quality

    run_quality(QualityOptions(**_options(args)))
    return 0


def _trajectories(args: argparse.Namespace) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    importing()
    from .command import TrajectoryOptions, run_trajectories

    run_trajectories(TrajectoryOptions(**_options(args)))
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the given values under the names of the options' fields."""
    given = {name: value for name, value in vars(args).items() if name != "run"}
    return {**given, "budgets": shares_of(args.budgets)}


def add_plot(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plot = kinds.add_parser(
        "plot",
        help="draw tables and pictures of what `bench quality` measured",
        description="Reads DIR/cells.jsonl. Writes tables, and draws two pictures: accuracy "
        "against bytes, and the effect of each change to the paper's method.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    plot.add_argument("folder", type=Path, metavar="DIR", help="folder that `bench quality` wrote")
    plot.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("bench-quality"), help="output folder"
    )
    plot.set_defaults(run=_plot)


def _plot(args: argparse.Namespace) -> int:
    from .plot import draw_plots

    for path in draw_plots(args.folder, args.out):
        print(path)
    return 0


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
