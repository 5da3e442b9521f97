"""Reads the command line of `verify`. Imports no torch, so that --help is quick."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from starkv_compile.cli import add_method, importing
from starkv_compile.config import INNER_BACKENDS

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verify = commands.add_parser(
        "verify",
        help="check on your machine that a model's compressed cache computes what it should",
        description="Runs one session of a model with a compressed cache and without starkv, and "
        "compares the logits of all tokens. The reference is the uncompiled model on a full cache, "
        "with an attention that does not see what the compressed cache has dropped. The exit code "
        "is 1 if a check finds a fault. By default the command runs the demo agent on a generated "
        "episode. It runs on a GPU if there is one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # fmt: off
    add = verify.add_argument
    add("--model", type=Path, metavar="DIR", default=argparse.SUPPRESS,
        help="folder of a Hugging Face checkpoint that replaces the agent; needs --image and "
        "--prompt")
    add("--image", type=Path, action="append", metavar="FILE", default=argparse.SUPPRESS,
        help="screenshot of a step; may be given several times, once for each step")
    add("--prompt", metavar="TEXT", default=argparse.SUPPRESS,
        help="text that follows each screenshot")
    add("--dtype", choices=DTYPES, default="auto",
        help="precision of the weights; the check is strictest in float32. auto: that of the files")
    add("--budget", default="0.2", help="share of the tokens seen that stays cached: 0.2 or 20%%")
    add_method(verify)
    add("--inner", choices=INNER_BACKENDS, default="eager",
        help="backend that compiles the rewritten graphs")
    add("--reply", type=int, metavar="N", default=16, help="most tokens of each reply")
    # fmt: on
    verify.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> int:
    # Torch reads it when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    importing()
    from .command import VerifyOptions, run_verify

    given = vars(args)
    return run_verify(
        VerifyOptions(
            model=given.get("model"),
            images=tuple(given.get("image", ())),
            prompt=given.get("prompt"),
            dtype=args.dtype,
            budget=args.budget,
            policy=given.get("policy"),
            paper=args.paper,
            inner=args.inner,
            reply=args.reply,
        )
    )
