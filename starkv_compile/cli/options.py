"""The options of every command that say how tokens are scored. Imports no torch."""

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
        help=f"a name in docs/guides/policies.md (default: {StarKVConfig.policy})",
    )
    parser.add_argument(
        "--paper", action="store_true", help="the method as released, not this package's defaults"
    )


def config_of(policy: str | None, paper: bool, **options: Any) -> StarKVConfig:
    """What `--policy` (None: not given) and `--paper` ask for.

    Raises:
        OptionError: both are given, and not of one method; or an option is impossible.
    """
    if paper and policy not in (None, "starkv"):
        raise OptionError(f"--paper is a form of policy 'starkv', not of {policy!r}")
    if policy is not None:
        options["policy"] = policy
    return StarKVConfig.paper(**options) if paper else StarKVConfig(**options)
