"""Runs `starkv demo`: one GUI session with a full cache and with compressed caches."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from starkv_compile import StarKVError
from starkv_compile.files import check_writable
from starkv_compile.optional import needs

from ..agent.checkpoints import agent_folder
from ..printing import print_table
from .kept import frame_grids, kept_by_layer
from .picture import Shot, draw_kept
from .runtimes import export_agent
from .tables import NOTES, QUESTIONS, answer_table, cost_table
from .turns import Turn, episode_turns, image_turns
from .ways import RUNS, Measured, Way, measure, ways


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Holds the options of the command line.

    agent: a checkpoint folder, or None for the demo agent. exported: the folder for the graphs
    of the runtime "onnx", or None for a folder that is removed at the end.
    """

    images: Sequence[Path] = ()
    question: str | None = None
    frames: int | None = None
    seed: int = 0
    budget: float = 0.2
    nbits: int = 16
    inner: str = "eager"
    out: Path = Path("demo-output")
    agent: Path | None = None
    runtime: str = "torch"
    exported: Path | None = None

    def turns(self) -> list[Turn]:
        """Returns the turns that the agent is asked.

        Raises:
            StarKVError: two options exclude each other, or a file cannot be read.
        """
        if not self.images:
            if self.question is not None:
                raise StarKVError(
                    "--question needs --image: a generated episode has its own questions"
                )
            return episode_turns(4 if self.frames is None else self.frames, self.seed)
        if self.frames is not None:
            raise StarKVError(
                "--frames needs a generated episode: with --image, each image is one frame"
            )
        return image_turns(self.images, self.question)


def run_demo(options: DemoOptions, console: Console | None = None) -> list[Measured]:
    """Runs the session in each way and prints the tables.

    Writes one picture for each compressed cache to `options.out`.

    Raises:
        StarKVError: an option is impossible, a file cannot be read, or no agent is found.
    """
    console = console or Console()
    chosen = ways(options.budget, options.inner, options.nbits)
    turns = options.turns()
    agent_folder(options.agent)
    if options.runtime == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            needs(package)
    elif options.exported is not None:
        raise StarKVError(
            "--exported needs --runtime onnx: it names the folder of the exported graphs"
        )
    check_writable(options.out / "kept.png", "--out")
    with tempfile.TemporaryDirectory() as temporary:
        results = _measure_all(chosen, turns, options, console, Path(temporary))
    print_table(console, answer_table(turns, results))
    console.print(QUESTIONS, style="dim", highlight=False)
    if options.images:
        console.print(
            "The agent is tiny and knows only its own generated screens. On your screenshots its "
            "answers mean nothing. The kept tokens and the costs are real."
        )
    print_table(console, cost_table(results))
    console.print(NOTES, style="dim", highlight=False)
    for path in _draw_all(turns, results, options.out):
        console.print("Picture of the kept tokens:", path, markup=False, soft_wrap=True)
    return results


def _measure_all(
    chosen: Sequence[Way],
    turns: Sequence[Turn],
    options: DemoOptions,
    console: Console,
    temporary: Path,
) -> list[Measured]:
    from transformers.utils import logging

    logging.disable_progress_bar()  # its "Loading weights" would cut through ours
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    asked = f"{len(turns)} turn{'s' * (len(turns) > 1)}"
    runs = RUNS[options.runtime]
    exported: dict[str, Path] = {}
    if options.runtime == "onnx":
        console.print(
            "Exporting the agent once for each cache. Each export takes about a minute on one core."
        )
        for way in chosen:
            exported[way.name] = (options.exported or temporary) / way.name
            say = partial(console.print, f"{way.title}:")
            export_agent(way.config, options.agent, exported[way.name], say)
    results: list[Measured] = []
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for way in reversed(chosen):  # the default first, whose answers are shown as they come
            task = progress.add_task(f"{way.title}: {asked}, {runs} runs", total=runs * len(turns))
            advance = partial(progress.advance, task)
            folder = exported.get(way.name)
            replied = None if results else partial(_show_reply, console, way.title)
            results.insert(0, measure(way, turns, options.agent, advance, folder, replied))
    return results


def _show_reply(console: Console, title: str, turn: Turn, reply: str) -> None:
    console.print(f"{title}: {turn.text} -> {reply}", markup=False, highlight=False, soft_wrap=True)


def _draw_all(turns: Sequence[Turn], results: Sequence[Measured], out: Path) -> list[Path]:
    """Draws one picture for each compressed cache."""
    paths = []
    for result in results:
        if result.way.config.keeps_everything:
            continue
        grids = iter(frame_grids(result.cache))
        shots = [Shot(turn.image, f"step {turn.step}", next(grids)) for turn in turns if turn.image]
        title = f"What the cache keeps of each screenshot ({result.way.title})"
        picture = draw_kept(title, shots, kept_by_layer(result.cache))
        paths.append(out / f"kept-{result.way.name}.png")
        picture.save(paths[-1])
    return paths
