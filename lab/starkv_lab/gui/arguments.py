"""Reads the command line of `bench gui`. Imports no torch, so that --help is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from starkv_compile import OptionError
from starkv_compile.cli import add_method, add_nbits, config_of, importing, share_of
from starkv_compile.config import INNER_BACKENDS


def add_gui(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    gui = kinds.add_parser(
        "gui",
        help="run a GUI model on ScreenSpot-v2, ScreenSpot-Pro, AndroidControl or AgentNetBench",
        description="Lets a model answer a benchmark's questions from a compressed cache. "
        "DIR/answers-*.jsonl gets one line for each sample. A second run skips the samples that "
        "are there, so it continues after an interruption. If the folder of --data has none of "
        "the benchmark's files, the error says where to download them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = gui.add_argument
    unset = argparse.SUPPRESS
    add(
        "dataset",
        nargs="?",
        default=unset,
        metavar="DATASET",
        help="screenspot-v2, screenspot-pro, androidcontrol or agentnetbench",
    )
    add(
        "--summary",
        type=Path,
        metavar="DIR",
        default=unset,
        help="run nothing; merge the shards in DIR into DIR/summary.json and print a table",
    )
    add("--data", type=Path, metavar="DIR", default=unset, help="folder of the unpacked data set")
    add(
        "--model",
        metavar="CHECKPOINT",
        default=unset,
        help="folder, or name on Hugging Face's hub; 'shipped' means the demo agent",
    )
    add(
        "--family",
        metavar="NAME",
        default=unset,
        help="prompt and grammar of answers: ui-tars, opencua, qwen2.5-vl or qwen3-vl "
        "(default: the family that the model's name contains)",
    )
    add(
        "--trust-remote-code",
        action="store_true",
        help="run code from the checkpoint; OpenCUA's checkpoints need it",
    )
    add("--out", type=Path, metavar="DIR", default=unset, help="folder for answers and summary")
    add(
        "--budget",
        default="0.2",
        help="share of the tokens seen that stays cached: 0.2 or 20%%; 1 for the full cache",
    )
    add_nbits(gui)
    add_method(gui)
    add(
        "--inner",
        choices=INNER_BACKENDS,
        default="eager",
        help="backend that compiles the rewritten graphs",
    )
    add("--images", type=int, metavar="N", default=5, help="most screenshots of a trajectory")
    add(
        "--texts",
        type=int,
        metavar="N",
        default=unset,
        help="most earlier steps that the prompt gives in words (default: 10)",
    )
    add(
        "--level",
        choices=("high", "low"),
        default="high",
        help="level of AndroidControl's instructions",
    )
    add(
        "--min-pixels",
        type=int,
        metavar="N",
        default=unset,
        help="fewest pixels of a resized screenshot (default: the checkpoint's)",
    )
    add(
        "--max-pixels",
        type=int,
        metavar="N",
        default=unset,
        help="most pixels of a resized screenshot (default: the checkpoint's)",
    )
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        default=unset,
        help="most tokens of an answer (default: 256, for AgentNetBench 512)",
    )
    add(
        "--sessions",
        action="store_true",
        help="run each trajectory on one cache, which every step compresses again; --images is how "
        "many of the newest screenshots stay in it",
    )
    add("--limit", type=int, metavar="N", default=unset, help="run only the first N samples")
    add(
        "--shard",
        metavar="I/N",
        default=unset,
        help="run part I of N, counted from 0 (default: RANK and WORLD_SIZE, else all samples)",
    )
    add(
        "--device",
        default=unset,
        help="torch device (default: the GPU of LOCAL_RANK, else the CPU)",
    )
    gui.set_defaults(run=_gui)


def _gui(args: argparse.Namespace) -> int:
    given = vars(args)
    if "summary" in given:
        return _summary(args.summary, "dataset" in given)
    missing = [f"--{name}" for name in ("data", "model", "out") if name not in given]
    if "dataset" not in given or missing:
        what = missing if "dataset" in given else ["DATASET", *missing]
        raise OptionError(f"bench gui needs {', '.join(what)}; or give only --summary DIR")
    if not args.data.is_dir():
        raise OptionError(f"--data {args.data}: there is no such folder; give the unpacked data")
    if args.sessions and "texts" in given:
        raise OptionError(
            f"--texts {args.texts} with --sessions: a session has no earlier steps in words; leave "
            "out one of them"
        )
    importing()
    from .run import GuiOptions, run_gui  # imports torch, which --help should not
    from .samples import Reading
    from .shards import shard_of

    choices = {"budget": share_of(args.budget), "nbits": args.nbits, "inner": args.inner}
    config = config_of(given.get("policy"), args.paper, **choices)
    run_gui(
        GuiOptions(
            dataset=args.dataset,
            data=args.data,
            model=args.model,
            out=args.out,
            family=given.get("family"),
            config=config,
            reading=Reading(
                images=args.images, texts=given.get("texts", Reading.texts), level=args.level
            ),
            pixels=(given.get("min_pixels"), given.get("max_pixels")),
            max_new_tokens=given.get("max_new_tokens"),
            limit=given.get("limit"),
            sessions=args.sessions,
            shard=shard_of(given.get("shard")),
            device=given.get("device"),
            trust_remote_code=args.trust_remote_code,
        )
    )
    return 0


def _summary(folder: Path, with_dataset: bool) -> int:
    if with_dataset:
        raise OptionError("--summary stands alone, because it runs nothing; leave out DATASET")
    from rich.console import Console

    from ..printing import print_table
    from .summary import summarise, table_of

    summary = summarise(folder)
    summary.write(folder)
    print_table(Console(), table_of(summary))
    return 0
