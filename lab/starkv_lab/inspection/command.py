"""Runs `starkv inspect`: checks the options and writes the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starkv_compile import OptionError, StarKVConfig
from starkv_compile.cli import config_of, progress, share_of
from starkv_compile.files import check_writable, replace_file

from ..demo.ways import MAX_REPLY
from .collect import collect
from .page import render
from .prompt import InspectedPrompt, checkpoint_prompt, episode_prompt, images_prompt
from .replies import replies

FRAMES = 4  # screenshots of a generated episode


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Holds the options of the command line.

    budgets: shares such as 0.2 or 20%, separated by commas. reply: length of the replies in tokens.
    None means the longest reply of the agent, and no replies with `model`, whose prompt would be
    computed once more for each budget.
    """

    images: Sequence[Path] = ()
    question: str | None = None
    frames: int | None = None
    seed: int | None = None
    agent: Path | None = None
    model: Path | None = None
    prompt: str | None = None
    policy: str | None = None
    paper: bool = False
    nbits: int = 16
    budgets: str = "40%,20%,10%,5%"
    reply: int | None = None
    out: Path = Path("inspect.html")

    def check(self) -> None:
        """Raises `OptionError` for options that exclude or need each other."""
        if self.model is not None:
            for name in ("question", "frames", "seed", "agent"):
                if getattr(self, name) is not None:
                    raise OptionError(
                        f"--{name} is an option of the agent: leave out --{name} or --model"
                    )
            if not self.images or not self.prompt:
                raise OptionError("--model needs --image FILE and --prompt TEXT")
        elif self.prompt is not None:
            raise OptionError("--prompt needs --model; use --question to ask the agent")
        elif not self.images:
            if self.question is not None:
                raise OptionError(
                    "--question needs --image: a generated episode has its own question"
                )
        elif self.frames is not None or self.seed is not None:
            raise OptionError(
                "--frames and --seed need a generated episode: with --image, each image is one "
                "frame"
            )
        if self.reply is not None and self.reply < 0:
            raise OptionError(
                f"--reply {self.reply}: expected a number of tokens, or 0 for no reply"
            )

    def config(self) -> StarKVConfig:
        return config_of(self.policy, self.paper, nbits=self.nbits)

    def shares(self) -> list[float]:
        """Returns the budgets as shares of the tokens, largest first.

        Raises:
            OptionError: a budget is no number, or is out of range.
        """
        return sorted({_share(text) for text in self.budgets.split(",")}, reverse=True)

    def reply_tokens(self) -> int:
        if self.reply is not None:
            return self.reply
        return MAX_REPLY if self.model is None else 0

    def load(self) -> InspectedPrompt:
        """Loads the prompt and its model. Raises `StarKVError` as the functions of `prompt` do."""
        if self.model is not None:
            return checkpoint_prompt(self.model, self.images, self.prompt or "")
        if self.images:
            return images_prompt(self.images, self.question, self.agent)
        frames = FRAMES if self.frames is None else self.frames
        return episode_prompt(frames, self.seed or 0, self.agent)


def _share(text: str) -> float:
    share = share_of(text)
    if not 0.01 <= share < 1:
        raise OptionError(
            f"--budget {text.strip()!r}: expected at least 1% and less than 100% of the tokens, "
            "such as --budget 40%,20%,10%,5%"
        )
    return share


def run_inspect(options: InspectOptions) -> Path:
    """Writes the page and returns its path. An error leaves no part of a page behind.

    Raises:
        StarKVError: an option is impossible, a file cannot be read or written, or the model cannot
            be compressed.
    """
    options.check()
    config, shares = options.config(), options.shares()
    check_writable(options.out, "--out, such as inspect.html")
    _quiet_loading()
    progress("loading the model")
    prompt = options.load()
    progress("running the prompt and scoring its tokens")
    inspection = collect(prompt, config, shares)
    length = options.reply_tokens()
    if length:
        progress(f"asking for {1 + len(shares)} replies: full cache, and each budget")
    page = render(inspection, replies(prompt, config, shares, length))
    replace_file(options.out, page.encode())
    return options.out


def _quiet_loading() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
