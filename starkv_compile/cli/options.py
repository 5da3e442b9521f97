"""What several commands share: budget, policy, words on progress. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..config import StarKVConfig
from ..errors import OptionError
from ..validation import share


def add_method(parser: argparse.ArgumentParser) -> None:
    """`--policy` and `--paper`."""
    parser.add_argument(
        "--policy",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help=f"policy that scores the tokens; any unknown name makes an error that lists them all "
        f"(default: {StarKVConfig.policy})",
    )
    parser.add_argument(
        "--paper", action="store_true", help="use STaR-KV as its authors released it"
    )


def add_nbits(parser: argparse.ArgumentParser) -> None:
    """`--nbits`."""
    parser.add_argument(
        "--nbits",
        type=int,
        choices=(16, 8, 4),
        default=16,
        help="bits in which a compressed cache stores each number of the kept tokens; 16 stands "
        "for the model's precision",
    )


def share_of(text: str) -> float:
    """A budget on the command line, as a share of the tokens: 0.2, or "20%", which is the same.

    Returns:
        The share, rounded once.

    Raises:
        OptionError: the text is neither, or a number above 1, which could be meant as a percentage.
    """
    return float(share(text))


def shares_of(text: str) -> list[float]:
    """Several budgets, separated by commas: "0.2,10%" is [0.2, 0.1].

    Raises:
        OptionError: as `share_of`.
    """
    return [share_of(number) for number in text.split(",")]


def config_of(policy: str | None, paper: bool, **options: Any) -> StarKVConfig:
    """Returns the configuration that `--policy` (None: not given) and `--paper` ask for.

    Raises:
        OptionError: `--paper` is given with another policy, or an option is impossible.
    """
    if paper and policy not in (None, "starkv"):
        raise OptionError(
            f"--policy {policy!r} with --paper: --paper is a form of policy 'starkv'; leave out "
            "one of the two"
        )
    if policy is not None:
        options["policy"] = policy
    return StarKVConfig.paper(**options) if paper else StarKVConfig(**options)


def importing() -> None:
    """Says so before a command imports PyTorch, which takes seconds in a new process."""
    if "torch" not in sys.modules:
        progress("importing PyTorch and transformers")


def progress(text: str) -> None:
    """Says on stderr what a command does now, so that its results can go through a pipe."""
    print(f"starkv: {text} ...", file=sys.stderr, flush=True)
