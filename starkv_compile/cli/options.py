"""Options that several commands share: the budget, and how tokens are scored. Imports no torch."""

from __future__ import annotations

import argparse
from fractions import Fraction
from typing import Any, Literal

from ..config import StarKVConfig
from ..errors import OptionError


def add_method(parser: argparse.ArgumentParser) -> None:
    """`--policy` and `--paper`."""
    parser.add_argument(
        "--policy",
        metavar="NAME",
        default=argparse.SUPPRESS,
        help=f"policy that scores the tokens, a name in docs/guides/policies.md (default: "
        f"{StarKVConfig.policy})",
    )
    parser.add_argument(
        "--paper", action="store_true", help="use STaR-KV as its authors released it"
    )


def share_of(text: str, plain: Literal["share", "percent"] = "share") -> float:
    """A budget on the command line, as a share of the tokens: "20%" is 0.2 in every command.

    Args:
        text: a number, or a percentage such as "20%".
        plain: what a number without % means in this command: a "share" (0.2) or "percent" (20).

    Returns:
        The share, rounded once. Its range is not checked.

    Raises:
        OptionError: the text is neither.
    """
    number, per_cent, rest = text.strip().partition("%")
    try:
        value = Fraction(number) / (100 if per_cent or plain == "percent" else 1)
        if not rest:
            return float(value)
    except (ValueError, ArithmeticError):
        pass
    expected = {"share": "a share such as 0.2", "percent": "a percentage such as 20"}[plain]
    raise OptionError(f"budget {text.strip()!r}: expected {expected}, or with a percent sign 20%")


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
