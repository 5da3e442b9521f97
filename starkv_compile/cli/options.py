"""The options that choose the policy, the same in every command. Imports no torch."""

from __future__ import annotations

import argparse
from typing import Any

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
