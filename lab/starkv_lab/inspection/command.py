"""`starkv inspect`: options to a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starkv_compile import OptionError, StarKVConfig, StarKVError
from starkv_compile.cli import config_of, share_of

from ..demo.ways import MAX_REPLY
from .collect import collect
from .page import render
from .prompt import InspectedPrompt, checkpoint_prompt, episode_prompt, images_prompt
from .replies import replies

FRAMES = 4  # of a generated episode


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """What the command line gives.

    budgets: percent, separated by commas. reply: tokens; None: as many as the agent says, and none
    of another model, whose prompt is computed once more for each budget.
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
    budgets: str = "40,20,10,5"
    reply: int | None = None
    out: Path = Path("inspect.html")

    def check(self) -> None:
        """Raise `OptionError` for options that do not go together."""
        if self.model is not None:
            for name in ("question", "frames", "seed", "agent"):
                if getattr(self, name) is not None:
                    raise OptionError(f"--{name} is the agent's: leave it out, or --model")
            if not self.images or not self.prompt:
                raise OptionError("--model goes with --image FILE and --prompt TEXT")
        elif self.prompt is not None:
            raise OptionError("--prompt goes with --model; the agent is asked by --question")
        elif not self.images:
            if self.question is not None:
                raise OptionError("--question goes with --image: an episode brings its own")
        elif self.frames is not None or self.seed is not None:
            raise OptionError(
                "--frames and --seed are for a generated episode: each --image is one frame"
            )
        if self.reply is not None and self.reply < 0:
            raise OptionError(f"--reply {self.reply}: expected a number of tokens, or 0 for none")

    def config(self) -> StarKVConfig:
        return config_of(self.policy, self.paper)

    def shares(self) -> list[float]:
        """The budgets as shares of 1, largest first.

        Raises:
            OptionError: one is no number, or out of range.
        """
        return sorted({_share(text) for text in self.budgets.split(",")}, reverse=True)

    def reply_tokens(self) -> int:
        if self.reply is not None:
            return self.reply
        return MAX_REPLY if self.model is None else 0

    def load(self) -> InspectedPrompt:
        """What is inspected. Raises `StarKVError` as the functions of `prompt` do."""
        if self.model is not None:
            return checkpoint_prompt(self.model, self.images, self.prompt or "")
        if self.images:
            return images_prompt(self.images, self.question, self.agent)
        frames = FRAMES if self.frames is None else self.frames
        return episode_prompt(frames, self.seed or 0, self.agent)


def _share(text: str) -> float:
    share = share_of(text, "percent")
    if not 0.01 <= share < 1:
        raise OptionError(
            f"--budget {text.strip()!r}: expected at least 1 and less than 100 percent of the "
            "tokens, such as --budget 40,20,10,5"
        )
    return share


def run_inspect(options: InspectOptions) -> Path:
    """Write the page, whole or not at all, and return its path.

    Raises:
        StarKVError: an option is impossible, a file cannot be read or written, or the model cannot
            be compressed.
    """
    options.check()
    config, shares = options.config(), options.shares()
    if options.out.is_dir():
        raise StarKVError(f"{options.out}: is a folder; give a file, such as inspect.html")
    _quiet_loading()
    prompt = options.load()
    inspection = collect(prompt, config, shares)
    page = render(inspection, replies(prompt, config, shares, options.reply_tokens()))
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StarKVError(f"{options.out}: cannot be written ({error})") from error
    return options.out


def _quiet_loading() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
