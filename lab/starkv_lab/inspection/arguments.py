"""Reads the command line of `inspect`. Imports no torch, so that --help is quick."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from starkv_compile.cli import add_method, add_nbits, importing


def add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="write a page that shows which tokens of a prompt each layer keeps, and why",
        description="Runs one prompt through the compiled model and writes one HTML file. The page "
        "shows the screenshots with the kept tokens of each layer, the scores by axis, and the "
        "dropped tokens. It needs no network and no other file. By default the command runs the "
        "demo agent on a generated episode.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # fmt: off
    add = inspect.add_argument
    add("--image", type=Path, action="append", metavar="FILE", default=argparse.SUPPRESS,
        help="use your screenshot instead of a generated episode; may be given several times")
    add("--question", metavar="TEXT", default=argparse.SUPPRESS,
        help="question to the agent about the --image, in the agent's words (default: which "
        "element is in the middle of the last one)")
    add("--frames", type=int, metavar="N", default=argparse.SUPPRESS,
        help="number of screenshots in the generated episode (default: 4; the agent was trained "
        "on up to 5)")
    add("--seed", type=int, metavar="N", default=argparse.SUPPRESS,
        help="seed of the generated episode (default: 0)")
    add("--agent", type=Path, metavar="DIR", default=argparse.SUPPRESS,
        help="checkpoint folder of the agent (default: the demo agent)")
    add("--model", type=Path, metavar="DIR", default=argparse.SUPPRESS,
        help="folder of a Hugging Face checkpoint that replaces the agent; needs --image and "
        "--prompt")
    add("--prompt", metavar="TEXT", default=argparse.SUPPRESS,
        help="text that follows the screenshots in the prompt of --model")
    add_nbits(inspect)
    add_method(inspect)
    add("--budget", metavar="P,Q", default="40%,20%,10%,5%",
        help="shares of the tokens that stay: 0.2 or 20%%; the page offers each of them")
    add("--reply", type=int, metavar="N", default=argparse.SUPPRESS,
        help="length in tokens of the replies from the full cache and at each budget; 0 asks for "
        "no replies (default: 12 for the agent, and 0 with --model, where each reply costs another "
        "prefill)")
    add("--out", type=Path, metavar="FILE", default=Path("inspect.html"),
        help="HTML file to write")
    # fmt: on
    inspect.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    # Torch reads it when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    importing()
    from .command import InspectOptions, run_inspect

    given = vars(args)
    names = ("question", "frames", "seed", "agent", "model", "prompt", "policy", "reply")
    path = run_inspect(
        InspectOptions(
            images=tuple(given.get("image", ())),
            paper=args.paper,
            nbits=args.nbits,
            budgets=args.budget,
            out=args.out,
            **{name: given.get(name) for name in names},
        )
    )
    print(f"written: {path} ({path.stat().st_size / 2**20:,.1f} MiB)")
    return 0
