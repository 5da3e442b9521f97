"""`starkv memory`: what a model takes, computed from its configuration. No weights are read."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from starkv_compile import OptionError
from starkv_compile.cli import importing, share_of
from starkv_compile.reporting import readable_bytes


def chunk_size(a_screen: int) -> int:
    """Tokens of a chunk that a prompt with such screenshots may be read in: a multiple of 1,024.

    It holds one and a half screenshots. Smaller chunks cost many answers (docs/guides/memory.md).
    """
    return max(2, math.ceil(1.5 * a_screen / 1024)) * 1024


def add_memory(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    memory = commands.add_parser(
        "memory",
        help="compute the bytes of weights, cache and prompt from a config file",
        description="Computes from config.json what a model takes with a number of screenshots: "
        "weights, the cache in full and compressed, and the peak of reading the prompt. The model "
        "is built without contents, so this takes seconds and no memory. Peaks are those of eager "
        "PyTorch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = memory.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a folder, or a config.json")
    add("--screens", type=int, metavar="N", default=5, help="screenshots in the prompt")
    add("--size", metavar="WxH", default="1920x1080", help="pixels of a screenshot")
    add("--text", type=int, metavar="N", default=500, help="tokens of text in the same prompt")
    add("--budget", default="0.2", help="share of the tokens that stays cached: 0.2 or 20%%")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="type of weights and cache",
    )
    add(
        "--max-pixels",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="pixels of a screenshot after resizing (default: the processor's limit)",
    )
    add(
        "--tokens-per-screen",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="tokens of a screenshot, if the checkpoint does not say",
    )
    add(
        "--chunk",
        type=int,
        metavar="N",
        default=argparse.SUPPRESS,
        help="tokens of a chunk, `prefill_chunk_size` (default: one and a half screenshots, at "
        "least 2048)",
    )
    memory.set_defaults(run=_memory)


def _memory(args: argparse.Namespace) -> int:
    importing()
    import torch

    from starkv_compile import StarKVConfig
    from starkv_compile.hf import check_folder, read_config

    from .screens import screen_tokens
    from .sizes import ModelSize

    width, height = _pixels(args.size)
    for name in ("screens", "text"):
        if getattr(args, name) < 0:
            raise OptionError(f"--{name} {getattr(args, name)}: expected 0 or more")
    for name in ("chunk", "max_pixels", "tokens_per_screen"):
        if getattr(args, name, 1) < 1:
            option = name.replace("_", "-")
            raise OptionError(f"--{option} {getattr(args, name)}: expected at least 1")
    kept = StarKVConfig(budget=share_of(args.budget))
    folder = args.checkpoint.parent if args.checkpoint.is_file() else args.checkpoint
    check_folder(folder)
    config = read_config(folder)
    a_screen = getattr(args, "tokens_per_screen", None)
    if a_screen is None:
        a_screen = screen_tokens(folder, config, width, height, getattr(args, "max_pixels", None))
    tokens = args.screens * a_screen + args.text
    if tokens < 2:
        raise OptionError("a prompt has at least 2 tokens: give --screens or --text")
    size = ModelSize(config, getattr(torch, args.dtype))
    stored = max(2, kept.capacity(tokens))
    chunk = min(getattr(args, "chunk", None) or chunk_size(a_screen), tokens)
    share = f"{kept.budget:.0%}"
    for what, value in (
        (f"weights, {args.dtype}", readable_bytes(size.weights)),
        (f"a screenshot of {width} x {height}", f"{a_screen:,} tokens"),
        ("its cache, full", readable_bytes(size.cache_bytes(a_screen))),
        (f"the prompt: {args.screens} screenshots, {args.text} of text", f"{tokens:,} tokens"),
        ("its cache, full", readable_bytes(size.cache_bytes(tokens))),
        (f"its cache at {share}", readable_bytes(size.cache_bytes(tokens, stored))),
        *(
            (f"the same in {nbits} bits", readable_bytes(size.cache_bytes(tokens, stored, nbits)))
            for nbits in (8, 4)
        ),
        ("peak of reading it at once, cache included", readable_bytes(size.prompt_bytes(tokens))),
        (f"the same at {share}", readable_bytes(size.prompt_bytes(tokens, kept=stored))),
        (
            f"the same at {share}, in chunks of {chunk:,}",
            readable_bytes(size.prompt_bytes(chunk, min(stored, tokens - chunk), stored)),
        ),
    ):
        print(f"{what:<46} {value:>14}")
    return 0


def _pixels(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None or "0" in found.groups():
        raise OptionError(f"--size {text!r}: expected width and height, such as 1920x1080")
    return int(found[1]), int(found[2])
