"""Adds the laboratory's commands to `starkv`. Imports no torch, so that --help is quick."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from starkv_compile.cli import add_nbits, importing, share_of
from starkv_compile.config import INNER_BACKENDS

from .gui.arguments import add_gui
from .inspection.arguments import add_inspect
from .memory.command import add_memory
from .quality.arguments import add_plot, add_quality, add_trajectories
from .verification.arguments import add_verify

__all__ = [  # the entry points
    "add_bench",
    "add_demo",
    "add_inspect",
    "add_memory",
    "add_models",
    "add_verify",
]


def add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="run the demo agent with a full cache and with two compressed caches",
        description="Runs the demo agent through one session of screenshots with three "
        "caches: full, compressed by the paper's method, and compressed by this package's "
        "defaults. The command prints the answers and their costs, and draws which parts of each "
        "screenshot each layer keeps.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = demo.add_argument
    add(
        "--image",
        type=Path,
        action="append",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="use your screenshot instead of a generated episode; may be given several times",
    )
    add(
        "--question",
        metavar="TEXT",
        default=argparse.SUPPRESS,
        help="question about each --image, in the agent's words "
        "(default: which element is in its middle)",
    )
    add(
        "--frames",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="number of screenshots in the generated episode (default: 4; the agent was trained "
        "on up to 5)",
    )
    add("--seed", type=int, default=0, help="seed of the generated episode")
    add("--budget", default="0.2", help="share of the tokens seen that stays cached: 0.2 or 20%%")
    add_nbits(demo)
    add(
        "--inner",
        choices=INNER_BACKENDS,
        default="eager",
        help="backend that compiles the rewritten graphs; inductor takes minutes on few cores",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("demo-output"),
        help="folder for the pictures",
    )
    add(
        "--agent",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="checkpoint folder of the agent (default: the demo agent)",
    )
    add(
        "--runtime",
        choices=("torch", "onnx"),
        default="torch",
        help="onnx: export the agent first, which takes minutes, then run it in ONNX Runtime",
    )
    add(
        "--exported",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="with --runtime onnx: write the graphs to this folder, or use the graphs that it "
        "already holds (default: a temporary folder)",
    )
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    # Torch reads these when it is imported. Without them its profiler prints messages of its own.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    importing()
    from .demo.demo import DemoOptions, run_demo  # imports torch, which --help should not

    run_demo(
        DemoOptions(
            images=tuple(getattr(args, "image", ())),
            question=getattr(args, "question", None),
            frames=getattr(args, "frames", None),
            seed=args.seed,
            budget=share_of(args.budget),
            nbits=args.nbits,
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
        help="say whether a model can be compressed; without a name, try every family",
        description="Builds a tiny random model of a family, and runs it with a full and with a "
        "compressed cache. The command says whether the family is compressed, and if not, the "
        "reason. Without a name it tries every family of the installed transformers, which takes "
        "about ten minutes. The exit code is 1 if a family gives wrong results.",
    )
    add = models.add_argument
    add(
        "families",
        nargs="*",
        metavar="MODEL",
        help="a family such as qwen2_5_vl, a checkpoint folder, or a name such as UI-TARS-1.5-7B",
    )
    add("--out", type=Path, metavar="FILE", help="write the table to this file, as Markdown")
    add("--exports", action="store_true", help="try the export of each family instead")
    models.set_defaults(run=_models)


def _models(args: argparse.Namespace) -> int:
    importing()
    from .matrix.command import run_models  # imports torch, which --help should not

    return run_models(args.families, args.out, args.exports)


def add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser("bench", help="measure how well compressed caches answer")
    kinds = bench.add_subparsers(required=True, metavar="KIND")
    add_quality(kinds)
    add_trajectories(kinds)
    add_plot(kinds)
    add_gui(kinds)
