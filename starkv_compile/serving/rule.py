"""How many tokens of a prompt stay: the same in the scheduler and in every worker."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..config import StarKVConfig
from ..errors import OptionError
from ..policies import (
    POLICIES,
    AgeDecay,
    CurrentFrame,
    KeyNovelty,
    MixKV,
    Random,
    ScreenNovelty,
    SnapKV,
    SnapKVMean,
    STLite,
    StreamingLLM,
    Tova,
)
from ..validation import share

SERVED = (
    ScreenNovelty,
    KeyNovelty,
    SnapKV,
    SnapKVMean,
    MixKV,
    STLite,
    AgeDecay,
    CurrentFrame,
    Tova,
    StreamingLLM,
    Random,
)
"""Policies of ours that need no more than keys, values and the last queries of one prompt."""

OURS = ("budget", "budget_tokens", "policy", "window")
"""Options of `StarKVConfig` that mean something in an engine."""

BUDGET = "starkv_budget"
"""The key of a request's own budget, in `extra_args` of its sampling parameters."""

FEWEST = 3
"""The least number of tokens that selection keeps exactly."""


@dataclass(frozen=True)
class Rule:
    """The compaction of every prompt of an engine."""

    config: StarKVConfig

    @classmethod
    def of(cls, given: Any) -> Rule:
        """The rule of the plugin's options.

        Raises:
            OptionError: an option is unknown, impossible, or means nothing in an engine.
        """
        if not isinstance(given, Mapping):
            raise OptionError(f"starkv={given!r}: expected options such as {{'budget': 0.2}}")
        config = StarKVConfig.from_options(dict(given))
        for field in dataclasses.fields(config):
            changed = getattr(config, field.name) != field.default
            if changed and field.name not in OURS:
                raise OptionError(
                    f"{field.name}={getattr(config, field.name)!r} has no meaning in vLLM, which "
                    f"has caches of its own; use {', '.join(OURS)} and options of the policy"
                )
        _check_policy(config)
        return cls(config)

    def dumps(self) -> str:
        return json.dumps(self.config.to_options(), sort_keys=True)

    @staticmethod
    @functools.cache
    def loads(text: str) -> Rule:
        return Rule(StarKVConfig.from_options(json.loads(text)))

    def capacity(self, length: int, budget: Fraction | None = None) -> int:
        """How many of `length` tokens stay at least, at the engine's budget or a request's."""
        if budget is None:
            return length if self.config.keeps_everything else self.config.capacity(length)
        return length * budget.numerator // budget.denominator

    def skip(self, length: int, block: int, budget: Fraction | None = None) -> int:
        """How many tokens a prompt of `length` loses: whole blocks of `block` tokens, or none."""
        return max(0, length - max(FEWEST, self.capacity(length, budget))) // block * block


def budget_of(params: Any) -> Fraction | None:
    """The budget that a request asks for; None for the engine's.

    Args:
        params: vLLM's sampling parameters, or None.

    Raises:
        OptionError: it is no share.
    """
    asked = (getattr(params, "extra_args", None) or {}).get(BUDGET)
    return None if asked is None else _share(str(asked))


@functools.lru_cache(1024)
def _share(text: str) -> Fraction:
    found = share(text, BUDGET)
    if not found:
        raise OptionError(f"{BUDGET}={text}: expected a share of the prompt above 0, at most 1")
    return found


def _check_policy(config: StarKVConfig) -> None:
    policy = config.policy
    ours = type(policy) in POLICIES.values()
    if config.is_uneven or policy.observers or (ours and type(policy) not in SERVED):
        raise OptionError(
            f"policy={policy.name!r} does not work in vLLM: it needs hidden states, earlier "
            "queries, a state between prompts, or layers that keep different numbers of tokens; "
            f"use one of {', '.join(kind.name for kind in SERVED)}"
        )
