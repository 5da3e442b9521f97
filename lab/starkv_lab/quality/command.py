"""Runs `bench quality` and `bench trajectories`: measures the missing cells and prints all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from starkv_compile import OptionError, StarKVConfig
from starkv_compile.errors import did_you_mean
from starkv_compile.policies import POLICIES, policy_names

from ..agent.checkpoints import agent_folder, weights_digest
from ..environment import environment
from ..printing import print_table
from .cells import CellFile
from .design import FRAMES, AnyDesign, Design, Trajectories
from .measure import Bench
from .tables import accuracy_table, write_csv
from .trajectories import TrajectoryBench
from .variants import BUDGETS, FULL, VARIANTS, Variant, policy_variant

MEASURED = ("policy", "ablation", "own")
"""The groups that the command measures when none is named."""
GROUPS = (*MEASURED, "chunks", "bits")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Holds the options of the command line.

    policies: names of variants; a name from `GROUPS` means all variants of the group. budgets:
    shares below 1. agent: a checkpoint folder, or None for the demo agent.

    Raises:
        OptionError: a budget is not between 0 and 1.
    """

    policies: Sequence[str] = MEASURED
    budgets: Sequence[float] = BUDGETS
    seed: int = 0
    threads: int = 1
    agent: Path | None = None
    out: Path = Path("bench-quality")

    def __post_init__(self) -> None:
        for budget in self.budgets:
            if not 0 < budget < 1:
                raise OptionError(
                    f"budget {budget:.0%}: expected more than 0 and less than 100 %; the command "
                    "always measures the full cache, which is 100 %"
                )


@dataclass(frozen=True, kw_only=True)
class QualityOptions(BenchOptions):
    questions: int = 2000
    frames: Sequence[int] = FRAMES


@dataclass(frozen=True, kw_only=True)
class TrajectoryOptions(BenchOptions):
    trajectories: int = 50
    steps: int = 20
    history: int = 5


def chosen(names: Sequence[str]) -> list[Variant]:
    """Returns the variants that `names` mean, in the order of `VARIANTS`, without the full cache.

    The variant `default` is also found by the name of the default policy.

    Raises:
        OptionError: a name is unknown.
    """
    registered = [name for name in policy_names() if name not in POLICIES]
    names = ["default" if name == StarKVConfig.policy else name for name in names]
    for name in names:
        if name not in VARIANTS and name not in GROUPS and name not in registered:
            known = [*VARIANTS, *registered]
            raise OptionError(
                f"policy {name!r}: {did_you_mean(name, [*known, *GROUPS])}expected one of "
                f"{', '.join(known)}; {', '.join(GROUPS)} mean all variants of a group"
            )
    found = [v for v in VARIANTS.values() if v.name in names or v.group in names]
    theirs = [policy_variant(name, name) for name in registered if name in names]
    return [variant for variant in found if variant is not FULL] + theirs


def run_quality(options: QualityOptions, console: Console | None = None) -> CellFile:
    """Measures every cell that `out` lacks, writes `quality.csv` next to them, and prints a table.

    Raises:
        StarKVError: an option is impossible, or the folder holds cells of another design.
    """
    design = Design.of(options.questions, options.seed, tuple(options.frames))
    weights, variants = agent_folder(options.agent), chosen(options.policies)
    bench = functools.partial(Bench, design, options.agent)
    return run_cells(options, design, weights, variants, bench, "quality.csv", console)


def run_trajectories(options: TrajectoryOptions, console: Console | None = None) -> CellFile:
    """Does the same for trajectories, and writes `trajectories.csv`.

    Some policies work for a single prompt only. The function skips them where a group includes
    them.

    Raises:
        StarKVError: as in `run_quality`, or `options.policies` names such a policy itself, or
            prompts in chunks, which only `run_quality` reads.
    """
    design = Trajectories(options.trajectories, options.steps, options.history, options.seed)
    variants = []
    for variant in chosen(options.policies):
        if variant.chunk is not None:
            raise OptionError(
                f"policy {variant.name!r}: trajectories read a prompt at once; `bench quality` "
                "measures chunks"
            )
        config = variant.config(0.5)
        if not variant.by_need and not config.is_uneven:
            variants.append(variant)
        elif variant.name in options.policies:
            raise OptionError(
                f"policy {variant.name!r} ends at one prompt, so it has no trajectory; leave it out"
            )
    weights = agent_folder(options.agent)
    bench = functools.partial(TrajectoryBench, design, options.agent)
    return run_cells(options, design, weights, variants, bench, "trajectories.csv", console)


def run_cells(
    options: BenchOptions,
    design: AnyDesign,
    model: Path,
    variants: Sequence[Variant],
    bench: Callable[[Callable[[], Any]], Any],
    csv: str,
    console: Console | None = None,
) -> CellFile:
    """Measures the cells of `variants` and of the full cache that `options.out` lacks.

    Args:
        model: folder of the weights that answer.
        bench: makes the object that measures. It is called only if a cell is missing, with a
            function to call after each round.
        csv: name of the table to write.

    Raises:
        StarKVError: the folder holds cells of another design or model.
    """
    console = console or Console()
    torch.set_num_threads(options.threads)
    file = CellFile(options.out, design, {"agent": weights_digest(model), **environment()})
    wanted = [(FULL, 1.0)] + [(v, b) for v in variants for b in options.budgets]
    missing = [(v, b) for v, b in wanted if not file.has(v.name, b, v.config(b))]
    console.print(
        f"Each cell has {design.prompts} prompts and {design.questions} questions. "
        f"{len(wanted) - len(missing)} of {len(wanted)} cells are there already."
    )
    if missing:
        _measure(bench, missing, file, console)
    write_csv(file, options.out / csv)
    keys = {(variant.name, budget) for variant, budget in wanted}
    print_table(console, accuracy_table(design, [c for c in file.cells.values() if c.key in keys]))
    return file


def _measure(
    bench: Callable[[Callable[[], Any]], Any],
    missing: Sequence[tuple[Variant, float]],
    file: CellFile,
    console: Console,
) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # its "Loading weights" would cut through ours
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    rounds = file.design.rounds
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("full cache", total=rounds * (1 + len(missing)))

        def advance() -> None:
            progress.advance(task)

        made = bench(advance)
        for number, (variant, budget) in enumerate(missing, start=2):
            progress.update(task, description=f"{variant.name} {budget:.0%}")
            file.add(made.measure(variant, budget, advance))
            progress.update(task, completed=rounds * number)  # what was there already is no work
