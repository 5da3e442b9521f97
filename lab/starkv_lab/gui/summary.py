"""Summarises a folder of answers: accuracy by the benchmark's own parts, bytes and seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from starkv_compile import StarKVError
from starkv_compile.files import replace_file
from starkv_compile.reporting import readable_bytes

from ..statistics import Bootstrap, wilson
from .benchmarks import dataset_of
from .records import PATTERN, read_answers

FILE = "summary.json"


@dataclass(frozen=True)
class Part:
    """Holds the results of the samples that share `group`, with 95 % intervals.

    group: empty for all samples. samples: their number. right: number of samples with full marks.
    accuracy: their share, with Wilson's interval, or that of a bootstrap over trajectories where
    samples are steps of some. score: mean of the benchmark's score, with the interval of such a
    bootstrap; it equals accuracy if the benchmark gives no part marks. unparsable:
    number of answers that are no action, which count as wrong.
    """

    group: dict[str, str]
    samples: int
    right: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    score: float
    score_interval: tuple[float, float]
    unparsable: int


@dataclass(frozen=True)
class Summary:
    """Holds the results of all shards of a folder.

    missing_shards: shards without a file. kept, seen: tokens of a layer, means over samples.
    nbytes, full_nbytes: bytes of the cache, means over samples. seconds: the median over samples,
    because the first samples of a process include compilation.
    """

    settings: dict[str, Any]
    missing_shards: list[int]
    parts: list[Part]
    kept: float
    seen: float
    nbytes: float
    full_nbytes: float
    seconds: float

    def write(self, folder: Path) -> Path:
        """Writes `summary.json` in one step, because shards may end at the same time."""
        path = folder / FILE
        replace_file(path, (json.dumps(asdict(self), indent=1) + "\n").encode())
        return path


def summarise(folder: Path) -> Summary:
    """Merges all shards of `folder`.

    Raises:
        StarKVError: the folder has no answers, or answers with different settings.
    """
    paths = sorted(folder.glob(PATTERN))
    if not paths:
        raise StarKVError(
            f"{folder}: no {PATTERN} in it; `bench gui DATASET --out DIR` writes them"
        )
    settings: dict[str, Any] = {}
    records: dict[str, dict[str, Any]] = {}
    for path in paths:
        here, answers = read_answers(path)
        for name in sorted(here.keys() | settings.keys() if settings else ()):
            if here.get(name) != settings.get(name):
                raise StarKVError(
                    f"{path} has {name}={here.get(name)!r}, {paths[0]} {settings.get(name)!r}: "
                    "their answers do not go together; give each setting its own folder"
                )
        settings = here
        records |= {record["id"]: record for record in answers}
    if not records:
        raise StarKVError(
            f"{folder}: no sample was answered yet; run `bench gui DATASET --out DIR` first"
        )
    answers = list(records.values())

    def mean(name: str) -> float:
        return float(np.mean([record[name] for record in answers]))

    there = {path.name for path in paths}
    count = settings["shards"]
    return Summary(
        settings=settings,
        missing_shards=[i for i in range(count) if f"answers-{i}-of-{count}.jsonl" not in there],
        parts=list(_parts(answers, (*dataset_of(settings["dataset"]).tables, ("steps",)))),
        kept=mean("kept"),
        seen=mean("seen"),
        nbytes=mean("bytes"),
        full_nbytes=mean("full_bytes"),
        seconds=float(np.median([record["seconds"] for record in answers])),
    )


def _parts(answers: Sequence[dict[str, Any]], tables: Sequence[Sequence[str]]) -> Iterator[Part]:
    yield part_of({}, answers)
    for names in tables:
        split: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for record in answers:
            if all(name in record["group"] for name in names):
                split.setdefault(tuple(record["group"][name] for name in names), []).append(record)
        for values, records in sorted(split.items()):
            yield part_of(dict(zip(names, values, strict=True)), records)


def part_of(group: dict[str, str], records: Sequence[dict[str, Any]]) -> Part:
    """Returns the results of the records of one part."""
    scores, counted = _by_trajectory(records)
    bootstrap = Bootstrap(len(scores))
    score = bootstrap.mean(scores, counted)
    right = int(((scores == 1) & (counted > 0)).sum())
    if scores.shape[1] == 1:
        interval = wilson(right, len(records))
    else:
        share = bootstrap.mean((scores == 1).astype(float), counted)
        interval = share.low, share.high
    return Part(
        group,
        len(records),
        right,
        right / len(records),
        interval,
        score.value,
        (score.low, score.high),
        sum(record["unparsable"] is not None for record in records),
    )


def _by_trajectory(records: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Scores [P, Q] of P trajectories, and which of the Q places hold a sample: 1 or 0.

    Steps of one trajectory are about one task, and in sessions they share a cache, so they are not
    independent. A sample without a trajectory stands alone.
    """
    together: dict[Any, list[float]] = {}
    for record in records:
        trajectory = record.get("trajectory")
        key = ("id", record["id"]) if trajectory is None else ("trajectory", trajectory)
        together.setdefault(key, []).append(record["score"])
    scores = np.zeros((len(together), max(map(len, together.values()))))
    counted = np.zeros_like(scores)
    for row, values in enumerate(together.values()):
        scores[row, : len(values)], counted[row, : len(values)] = values, 1
    return scores, counted


def table_of(summary: Summary) -> Table:
    """Makes the table to print, with a line for each part."""
    settings, share = summary.settings, summary.nbytes / summary.full_nbytes
    title = f"{dataset_of(settings['dataset']).title}, {settings['model']} (95 % intervals)"
    caption = (
        f"A layer keeps {summary.kept:,.0f} of {summary.seen:,.0f} tokens. The cache takes "
        f"{readable_bytes(round(summary.nbytes))} of {readable_bytes(round(summary.full_nbytes))} "
        f"({share:.1%}). "
        f"A sample takes {summary.seconds:.2f} s."
    )
    if summary.missing_shards:
        caption += f" These shards are missing: {', '.join(map(str, summary.missing_shards))}."
    table = Table(title=title, caption=caption)
    marks = any(part.score != part.accuracy for part in summary.parts)
    for name in ("part", "samples", "right", *(["score"] if marks else []), "unparsable"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in summary.parts:
        cells = [", ".join(part.group.values()) or "all", str(part.samples)]
        cells.append(_share(part.accuracy, part.accuracy_interval))
        if marks:
            cells.append(_share(part.score, part.score_interval))
        table.add_row(*cells, str(part.unparsable))
    return table


def _share(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.1%} ({100 * interval[0]:.1f}-{100 * interval[1]:.1f})"
