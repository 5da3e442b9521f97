"""Runs `starkv bench gui`: answers the missing samples, then prints the summary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from starkv_compile import OptionError, StarKVConfig

from ..environment import environment
from ..printing import print_table
from .actions import UnparsableAnswer
from .benchmarks import dataset_of, fingerprint
from .families import family_of
from .families.base import Family
from .model import Answer, GuiModel
from .records import AnswerFile
from .samples import Dataset, Reading, Sample
from .shards import Shard, device_of
from .summary import Summary, summarise, table_of
from .trajectories import GuiSession, part_of, reading_of, trajectories


@dataclass(frozen=True, kw_only=True)
class GuiOptions:
    """Holds the options of the command line.

    model: a folder, a name on Hugging Face's hub, or "shipped". family: None takes the family from
    the model's name. pixels: fewest and most pixels of a resized screenshot, None for the
    checkpoint's. limit: number of samples to run, None for all. sessions: whether each trajectory
    runs on one cache. trust_remote_code: whether code from the checkpoint may run.

    Raises:
        OptionError: a value is impossible.
    """

    dataset: str
    data: Path
    model: str
    out: Path
    family: str | None = None
    config: StarKVConfig = field(default_factory=lambda: StarKVConfig(inner="eager"))
    reading: Reading = field(default_factory=Reading)
    pixels: tuple[int | None, int | None] = (None, None)
    max_new_tokens: int | None = None
    limit: int | None = None
    sessions: bool = False
    shard: Shard = field(default_factory=Shard)
    device: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, needed in (("images", 1), ("texts", 0)):
            if getattr(self.reading, name) < needed:
                raise OptionError(
                    f"{name}={getattr(self.reading, name)}: expected {needed} or more"
                )
        if self.reading.level not in ("high", "low"):
            raise OptionError(f"level {self.reading.level!r}: expected high or low")
        if self.sessions and self.reading.level == "low":
            raise OptionError(
                "--sessions with level low: each low-level instruction is a task of its own, but a "
                "session has one task; give --level high"
            )
        if self.sessions and self.config.is_uneven:
            raise OptionError(
                f"--sessions with policy={self.config.policy.name!r}, "
                f"layer_budgets={self.config.layer_budgets!r}: layers would store different "
                "numbers of tokens, which takes one prompt per cache; take another policy and no "
                "layer_budgets"
            )
        least, most = self.pixels
        for name, value in (
            ("limit", self.limit),
            ("max_new_tokens", self.max_new_tokens),
            ("min_pixels", least),
            ("max_pixels", most),
        ):
            if value is not None and value < 1:
                raise OptionError(f"{name}={value}: expected 1 or more")
        if least is not None and most is not None and least > most:
            raise OptionError(
                f"min_pixels={least}, max_pixels={most}: expected min_pixels to be the smaller"
            )

    def settings(self, dataset: Dataset, family: str) -> dict[str, Any]:
        """Returns the settings that runs must share so that their answers can be merged."""
        config = {f"config.{name}": value for name, value in self.config.describe().items()}
        return {
            "dataset": dataset.name,
            "data": fingerprint(dataset, self.data),
            "model": self.model,
            "family": family,
            "images": self.reading.images,
            "texts": None if self.sessions else self.reading.texts,
            "level": self.reading.level,
            "pixels": self.pixels,
            "max_new_tokens": self.max_new_tokens or dataset.tokens,
            "sessions": self.sessions,
            **config,
        }


def run_gui(options: GuiOptions, console: Console | None = None) -> Summary | None:
    """Answers every sample of the shard that `out` lacks, writes `summary.json`, prints a table.

    Returns:
        The summary of all shards in `out`; None if this shard has no samples.

    Raises:
        StarKVError: an option is impossible, a file is missing or malformed, or the folder holds
            answers with other settings.
    """
    console = console or Console()
    dataset, family = dataset_of(options.dataset), family_of(options.model, options.family)
    if options.sessions and not family.fits_sessions:
        raise OptionError(
            f"--sessions with family {family.name}: its models put visual tokens in by themselves, "
            "which a session does not expect; leave out --sessions"
        )
    device = device_of(options.device)
    settings = options.settings(dataset, family.name)
    machine = environment(device.partition(":")[0])
    file = AnswerFile(options.out, options.shard, settings, machine)
    if file.done:
        console.print(f"{len(file.done)} answers are there already.")
    missing = (
        part
        for part in options.shard.of(_parts(dataset, options))
        if any(sample.id not in file.done for sample in part)
    )
    first = next(missing, None)  # reads and checks the data before it loads a model
    if first is None and not file.done:
        file.begin()
        console.print(f"Shard {options.shard.index} of {options.shard.count} has no samples.")
        return None
    if first is not None:
        model = GuiModel(
            family,
            options.model,
            options.config,
            device,
            options.pixels,
            options.trust_remote_code,
        )
        tokens = settings["max_new_tokens"]
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(f"{dataset.title}, shard {options.shard.index}", total=None)
            for part in chain((first,), missing):
                for record in _answers(model, dataset, part, tokens, options, file.done):
                    file.add(record)
                    progress.advance(task)
    summary = summarise(options.out)
    summary.write(options.out)
    print_table(console, table_of(summary))
    return summary


def _parts(dataset: Dataset, options: GuiOptions) -> Iterable[list[Sample]]:
    """Returns what one process must answer as a whole: trajectories or single samples."""
    if not options.sessions:
        return ([s] for s in islice(dataset.read(options.data, options.reading), options.limit))
    samples = dataset.read(options.data, reading_of(options.reading))
    return trajectories(islice(samples, options.limit), str(options.data))


def _answers(
    model: GuiModel,
    dataset: Dataset,
    part: list[Sample],
    tokens: int,
    options: GuiOptions,
    done: set[str],
) -> Iterator[dict[str, Any]]:
    """Yields the records of the samples of `part` that are not `done`."""
    family = model.family
    if not options.sessions:
        yield from (
            record_of(family, dataset, sample, model.answer(sample, tokens)) for sample in part
        )
        return
    session, left = GuiSession(model, options.reading.images), len(part)
    while left and part[left - 1].id in done:
        left -= 1
    for step, sample in enumerate(part[:left], start=1):
        if sample.id in done:
            session.skip(sample)
        else:
            placed = replace(sample, group={**sample.group, "steps": part_of(step)})
            yield record_of(family, dataset, placed, session.answer(sample, tokens))


def record_of(family: Family, dataset: Dataset, sample: Sample, said: Answer) -> dict[str, Any]:
    """Judges an answer, and returns its record, which is one line of the file."""
    unparsable = None
    try:
        actions = family.parse(said.text, said.screen)
    except UnparsableAnswer as error:
        actions, unparsable = (), str(error)
    score = dataset.score(sample.target, actions, said.screen.size)
    return {
        "id": sample.id,
        "trajectory": sample.trajectory,
        "group": dict(sample.group),
        "prompt": said.prompt,
        "answer": said.text,
        "actions": [action.to_json() for action in actions],
        "unparsable": unparsable,
        "target": sample.target,
        "size": said.screen.size,
        "shown": said.screen.shown,
        "score": score,
        "correct": score == 1,
        "kept": said.kept,
        "seen": said.seen,
        "bytes": said.nbytes,
        "full_bytes": said.full_nbytes,
        "seconds": said.seconds,
    }
