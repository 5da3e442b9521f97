"""Runs `starkv verify`: loads the model, checks it, and prints a line for each check."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from starkv_compile import OptionError, StarKVConfig
from starkv_compile.cli import config_of, progress, share_of

from ..agent.checkpoints import load_agent
from ..demo.turns import episode_turns, open_screenshot
from ..inspection.prompt import load_checkpoint, on_device
from .sessions import Content
from .verify import Verification, verify

FRAMES, SEED = 3, 0  # of the agent's episode
WIDTH, INDENT = 84, 12 * " "


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Holds the options of the command line.

    budget: a share such as 0.2 or 20%. dtype: "auto", or the name of a type of torch.
    """

    model: Path | None = None
    images: Sequence[Path] = ()
    prompt: str | None = None
    dtype: str = "auto"
    budget: str = "0.2"
    policy: str | None = None
    paper: bool = False
    inner: str = "eager"
    reply: int = 16

    def check(self) -> None:
        """Raises `OptionError` for options that need each other."""
        if self.model is None:
            for name, given in (("image", self.images), ("prompt", self.prompt)):
                if given:
                    raise OptionError(
                        f"--{name} needs --model: the agent has screenshots of its own"
                    )
        elif not self.images or not self.prompt:
            raise OptionError("--model needs --image FILE and --prompt TEXT")

    def config(self) -> StarKVConfig:
        return config_of(self.policy, self.paper, budget=share_of(self.budget), inner=self.inner)

    def turns(self) -> list[Content]:
        """Returns a turn for each screenshot. Raises `StarKVError` for files that are no picture.

        The turns of the agent's episode end with two questions without a screenshot.
        """
        if self.model is None:
            return [turn.content for turn in episode_turns(FRAMES, SEED)]
        text = {"type": "text", "text": self.prompt}
        return [[{"type": "image", "image": open_screenshot(p)}, text] for p in self.images]

    def load(self) -> tuple[Any, Any]:
        """Returns model and processor.

        Raises:
            StarKVError: the folder holds no model with its processor.
        """
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        if self.model is not None:
            return load_checkpoint(self.model, dtype)
        model, processor = load_agent()
        return on_device(model if dtype == "auto" else model.to(dtype)), processor


def run_verify(options: VerifyOptions) -> int:
    """Prints what was found. Returns the exit code: 1 if there is a fault.

    Raises:
        StarKVError: an option is impossible, a file cannot be read, or the model cannot be
            compressed.
    """
    options.check()
    config, turns = options.config(), options.turns()
    from transformers.utils import logging

    logging.disable_progress_bar()
    progress("loading the model")
    model, processor = options.load()
    found = verify(model, processor, turns, config, tokens=options.reply, say=progress)
    print(_text(options, model, config, found))
    return int(not found.right)


def _text(options: VerifyOptions, model: Any, config: StarKVConfig, found: Verification) -> str:
    name = "the demo agent" if options.model is None else options.model.resolve().name
    where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "the CPU"
    dtype = str(model.dtype).removeprefix("torch.")
    lines = [
        f"{name}, {dtype}, on {where}: {len(found.replies)} turns, policy {config.policy.name}, "
        f"budget {config.budget:g}, inner {config.inner}",
        "",
    ]
    for check in found.checks:
        lines.append(f"{check.verdict:<{len(INDENT)}}{check.what}")
        lines += textwrap.wrap(check.detail, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
    lines += ["", str(found.report)]
    if not found.right:
        lines += ["", "Please report this, with the output of `starkv doctor`."]
    return "\n".join(lines)
