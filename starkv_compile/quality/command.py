"""`python -m starkv_compile bench quality`: measure what is missing, then say what was found."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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

from ..agent.checkpoints import agent_folder
from ..errors import OptionError
from ..machine import environment
from .cells import CellFile
from .design import FRAMES, Design
from .measure import Bench
from .tables import accuracy_table, write_csv
from .variants import BUDGETS, FULL, VARIANTS, Variant

GROUPS = ("policy", "ablation", "own")


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """What the command line gives. policies: names of variants, or of `GROUPS` for all of
    such. budgets: shares below 1. agent: a checkpoint folder, None for the shipped one."""

    policies: Sequence[str] = GROUPS
    budgets: Sequence[float] = BUDGETS
    questions: int = 2000
    frames: Sequence[int] = FRAMES
    seed: int = 0
    threads: int = 1
    agent: Path | None = None
    out: Path = Path("bench-quality")


def chosen(names: Sequence[str]) -> list[Variant]:
    """The variants that `names` mean, in the order of the registry; the full cache is not one.

    Raises:
        OptionError: a name is unknown.
    """
    for name in names:
        if name not in VARIANTS and name not in GROUPS:
            raise OptionError(
                f"policy {name!r}: known are {', '.join(VARIANTS)}; {', '.join(GROUPS)} stand "
                "for all of a kind"
            )
    found = [v for v in VARIANTS.values() if v.name in names or v.group in names]
    return [variant for variant in found if variant is not FULL]


def run_quality(options: QualityOptions, console: Console | None = None) -> CellFile:
    """Measure every cell that `out` lacks; write `quality.csv` beside them and print a table.

    Raises:
        StarKVError: an option is impossible, or the folder holds cells of another design.
    """
    console = console or Console()
    variants = chosen(options.policies)
    for budget in options.budgets:
        if not 0 < budget < 1:
            raise OptionError(f"budget {budget:.0%}: more than 0 and less than 100 %; 100 % is "
                              "the full cache, which is always measured")  # fmt: skip
    torch.set_num_threads(options.threads)
    design = Design.of(options.questions, options.seed, tuple(options.frames))
    file = CellFile(options.out, design, {"agent": _agent(options.agent), **environment()})
    wanted = [(FULL, 1.0)] + [(v, b) for v in variants for b in options.budgets]
    missing = [(v, b) for v, b in wanted if not file.has(v.name, b, v.config(b))]
    console.print(
        f"{design.prompts} prompts, {design.questions} questions a cell; "
        f"{len(wanted) - len(missing)} of {len(wanted)} cells are there already"
    )
    if missing:
        _measure(design, missing, file, options.agent, console)
    write_csv(file, options.out / "quality.csv")
    keys = {(variant.name, budget) for variant, budget in wanted}
    console.print(accuracy_table(design, [c for c in file.cells.values() if c.key in keys]))
    return file


def _measure(
    design: Design,
    missing: Sequence[tuple[Variant, float]],
    file: CellFile,
    agent: Path | None,
    console: Console,
) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # its "Loading weights" would cut through ours
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    batches = len(design.batches())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("full answers", total=batches * (1 + len(missing)))

        def advance() -> None:
            progress.advance(task)

        bench = Bench(design, agent, advance)
        for variant, budget in missing:
            progress.update(task, description=f"{variant.name} {budget:.0%}")
            file.add(bench.measure(variant, budget, advance))


def _agent(folder: Path | None) -> str:
    """What tells one agent's answers from another's."""
    weights = agent_folder(folder) / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
