"""The commands that the laboratory adds to `starkv`. Imports no torch, so that --help is quick."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from starkv_compile.cli import share_of
from starkv_compile.config import INNER_BACKENDS

from .gui.arguments import add_gui
from .inspection.arguments import add_inspect
from .quality.arguments import add_plot, add_quality, add_trajectories

__all__ = ["add_bench", "add_demo", "add_inspect", "add_models"]  # the entry points


def add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="run the embedded GUI agent with a full and a compressed cache, side by side",
        description="Runs the embedded GUI agent through a session of screenshots three ways: full "
        "cache, the paper's method, and this package's defaults. Prints answers and costs, and "
        "draws what each layer keeps of each screenshot.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = demo.add_argument
    add(
        "--image",
        type=Path,
        action="append",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="a screenshot of yours in place of a generated episode; may be given again",
    )
    add(
        "--question",
        metavar="TEXT",
        default=argparse.SUPPRESS,
        help="what to ask about each --image, in the agent's words "
        "(default: what is in its middle)",
    )
    add(
        "--frames",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="screenshots of the generated episode (default: 4; the agent knows up to 5)",
    )
    add("--seed", type=int, default=0, help="which episode is generated")
    add("--budget", default="0.2", help="share of the tokens seen that stays cached: 0.2 or 20%%")
    add(
        "--inner",
        choices=INNER_BACKENDS,
        default="eager",
        help="backend under starkv; eager because inductor compiles for minutes on few cores",
    )
    add("--out", type=Path, metavar="DIR", default=Path("demo-output"), help="for the pictures")
    add(
        "--agent",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="checkpoint folder of the agent (default: the one shipped)",
    )
    add(
        "--runtime",
        choices=("torch", "onnx"),
        default="torch",
        help="onnx: exported first, some minutes, then run by ONNX Runtime",
    )
    add(
        "--exported",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="with --runtime onnx: keep the graphs there, and use those that are "
        "(default: a temporary folder)",
    )
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    # Torch reads these when it is imported; without them its profiler reports on itself.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from starkv_lab.demo.demo import DemoOptions, run_demo  # imports torch, which --help should not

    run_demo(
        DemoOptions(
            images=tuple(getattr(args, "image", ())),
            question=getattr(args, "question", None),
            frames=getattr(args, "frames", None),
            seed=args.seed,
            budget=share_of(args.budget),
            inner=args.inner,
            out=args.out,
            agent=getattr(args, "agent", None),
            runtime=args.runtime,
            exported=getattr(args, "exported", None),
        )
    )
    return 0


def add_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    models = commands.add_parser(
        "models",
        help="try every model family that the installed transformers ships",
        description="Builds a tiny random model of each family and runs it with a full and a "
        "compressed cache. Prints what is compressed, and what is not and why. All of them take "
        "some ten minutes. Exit code 1 if a family is wrong.",
    )
    add = models.add_argument
    add("families", nargs="*", metavar="FAMILY", help="only these, such as qwen2_5_vl")
    add("--out", type=Path, metavar="FILE", help="write the table there, as Markdown")
    add("--exports", action="store_true", help="their export instead, as far as it depends on them")
    models.set_defaults(run=_models)


def _models(args: argparse.Namespace) -> int:
    from starkv_lab.matrix.table import run_models  # imports torch, which --help should not

    return run_models(args.families, args.out, args.exports)


def add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser("bench", help="measure what a compressed cache still answers")
    kinds = bench.add_subparsers(required=True, metavar="KIND")
    add_quality(kinds)
    add_trajectories(kinds)
    add_plot(kinds)
    add_gui(kinds)
