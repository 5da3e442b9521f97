"""The command line of `inspect`. Imports no torch, so that --help is quick."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from starkv_compile.cli import add_method


def add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="write a page that shows what is kept of a prompt, layer by layer, and why",
        description="Runs one prompt through the compiled model and writes one HTML file that "
        "needs nothing else: the screenshots with the kept tokens of each layer, scores by axis, "
        "and what was dropped. By default the shipped agent on a generated episode.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # fmt: off
    add = inspect.add_argument
    add("--image", type=Path, action="append", metavar="FILE", default=argparse.SUPPRESS,
        help="a screenshot of yours in place of a generated episode; may be given again")
    add("--question", metavar="TEXT", default=argparse.SUPPRESS,
        help="what to ask the agent about the --image, in its words (default: what is in the "
        "middle of the last)")
    add("--frames", type=int, metavar="N", default=argparse.SUPPRESS,
        help="screenshots of the generated episode (default: 4; the agent knows up to 5)")
    add("--seed", type=int, metavar="N", default=argparse.SUPPRESS,
        help="which episode is generated (default: 0)")
    add("--agent", type=Path, metavar="DIR", default=argparse.SUPPRESS,
        help="checkpoint folder of the agent (default: the one shipped)")
    add("--model", type=Path, metavar="DIR", default=argparse.SUPPRESS,
        help="a Hugging Face checkpoint in place of the agent, with --image and --prompt")
    add("--prompt", metavar="TEXT", default=argparse.SUPPRESS,
        help="what that model is told after the screenshots")
    add_method(inspect)
    add("--budget", metavar="P,Q", default="40,20,10,5",
        help="percent of the tokens that stay: 20 or 20%%; the page offers each of them")
    add("--reply", type=int, metavar="N", default=argparse.SUPPRESS,
        help="tokens of a reply, from the full cache and at each budget; 0 for none (default: 12 "
        "of the agent; 0 with --model, as each costs another prefill)")
    add("--out", type=Path, metavar="FILE", default=Path("inspect.html"))
    # fmt: on
    inspect.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    # Torch reads it when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from .command import InspectOptions, run_inspect

    given = vars(args)
    names = ("question", "frames", "seed", "agent", "model", "prompt", "policy", "reply")
    path = run_inspect(
        InspectOptions(
            images=tuple(given.get("image", ())),
            paper=args.paper,
            budgets=args.budget,
            out=args.out,
            **{name: given.get(name) for name in names},
        )
    )
    print(f"written: {path} ({path.stat().st_size:,} bytes)")
    return 0
