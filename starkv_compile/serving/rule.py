"""How many tokens of a prompt stay: the same in the scheduler and in every worker."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
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

CHUNK = "prefill_chunk_size"
"""The option that also compacts a prompt while it is read, each time so many tokens are there."""

BUDGET = "starkv_budget"
"""The key of a request's own budget, in `extra_args` of its sampling parameters."""

FEWEST = 3
"""The least number of tokens that selection keeps exactly."""


@dataclass(frozen=True)
class Rule:
    """The compaction of every prompt of an engine.

    A prompt is compacted at its stops: at its end, and if `chunk` is given after each `chunk`
    tokens before. A stop is never so near the end that the last window would begin before it.

    Attributes:
        config: budget, policy and window.
        chunk: tokens between two stops. None: the end is the only stop.
    """

    config: StarKVConfig
    chunk: int | None = None

    @classmethod
    def of(cls, given: Any) -> Rule:
        """The rule of the plugin's options.

        Raises:
            OptionError: an option is unknown, impossible, or means nothing in an engine.
        """
        if not isinstance(given, Mapping):
            raise OptionError(f"starkv={given!r}: expected options such as {{'budget': 0.2}}")
        options = dict(given)
        chunk = options.pop(CHUNK, None)
        config = StarKVConfig.from_options(options)
        for field in dataclasses.fields(config):
            changed = getattr(config, field.name) != field.default
            if changed and field.name not in OURS:
                raise OptionError(
                    f"{field.name}={getattr(config, field.name)!r} has no meaning in vLLM, which "
                    f"has caches of its own; use {', '.join(OURS)}, {CHUNK}, options of the policy"
                )
        _check_policy(config)
        _check_chunk(chunk, config.scoring_window)
        return cls(config, chunk)

    def dumps(self) -> str:
        return json.dumps({**self.config.to_options(), CHUNK: self.chunk}, sort_keys=True)

    @staticmethod
    @functools.cache
    def loads(text: str) -> Rule:
        return Rule.of(json.loads(text))

    def keeps_everything(self, budget: Fraction | None = None) -> bool:
        """Whether no prompt loses a token, at the engine's budget or a request's."""
        return self.config.keeps_everything if budget is None else budget == 1

    def capacity(self, length: int, budget: Fraction | None = None) -> int:
        """How many of `length` tokens stay at least, at the engine's budget or a request's."""
        if self.keeps_everything(budget):
            return length
        if budget is None:
            return self.config.capacity(length)
        return length * budget.numerator // budget.denominator

    def skip(self, length: int, block: int, budget: Fraction | None = None) -> int:
        """How many of `length` tokens are gone at a stop: whole blocks of `block`, or none."""
        return max(0, length - max(FEWEST, self.capacity(length, budget))) // block * block

    def next_stop(self, computed: int, length: int) -> int:
        """At how many tokens a prompt of `length` is compacted next, if `computed` are there."""
        if self.chunk is None or computed >= length:
            return length
        stop = (computed // self.chunk + 1) * self.chunk
        return stop if stop <= length - self.config.scoring_window else length

    def last_stop(self, computed: int, length: int) -> int:
        """At how many tokens it was compacted last; 0 if it was not yet."""
        if computed >= length:
            return length
        if self.chunk is None:
            return 0
        latest = max(0, min(computed, length - self.config.scoring_window))
        return latest // self.chunk * self.chunk

    def stops(self, length: int) -> Iterator[int]:
        """All stops of a prompt of `length` tokens, ascending."""
        stop = 0
        while stop < length:
            stop = self.next_stop(stop, length)
            yield stop

    def gone(self, computed: int, length: int, block: int, budget: Fraction | None = None) -> int:
        """How many tokens of a prompt of `length` are gone if `computed` were computed."""
        return self.skip(self.last_stop(computed, length), block, budget)

    def first_drop(self, length: int, block: int, budget: Fraction | None = None) -> int | None:
        """The first stop of a prompt at which tokens leave; None if they never do.

        All that is computed after it is the prompt's own, in every layer.
        """
        if not self.skip(length, block, budget):
            return None
        return next(stop for stop in self.stops(length) if self.skip(stop, block, budget))

    def shared(self, length: int, block: int, budget: Fraction | None = None) -> int | None:
        """How many tokens at a prompt's beginning a compacted layer can share; None: all of them.

        What is written again is the prompt's own.
        """
        stop = self.first_drop(length, block, budget)
        return None if stop is None else self.skip(stop, block, budget)

    def most_blocks(
        self, length: int, total: int, block: int, budget: Fraction | None, delay: int
    ) -> int:
        """How many blocks a request needs at once until `total` tokens are computed.

        Args:
            length: tokens of its prompt.
            total: these and outputs that are computed again with them.
            block: tokens in a block.
            budget: the request's own.
            delay: how many steps later than a stop its blocks are freed.
        """
        stops = list(self.stops(length))
        ends = [*stops[:-1], max(total, length)]
        freed = [0] * (1 + delay) + [self.skip(stop, block, budget) for stop in stops]
        return max(-(-end // block) - gone // block for end, gone in zip(ends, freed, strict=False))


def budget_of(params: Any) -> Fraction | None:
    """The budget that a request asks for; None for the engine's.

    Args:
        params: vLLM's sampling parameters, or None.

    Raises:
        OptionError: it is no share, or another key begins like ours.
    """
    return budget_in(getattr(params, "extra_args", None))


def budget_in(extra: Mapping[str, Any] | None) -> Fraction | None:
    """The same for `extra_args` of sampling parameters, which are `vllm_xargs` over HTTP."""
    if not extra:
        return None
    for key in extra:
        if key != BUDGET and str(key).startswith("starkv"):
            raise OptionError(f"{key}: no such option of a request; the only one is {BUDGET}")
    asked = extra.get(BUDGET)
    return None if asked is None else _share(str(asked))


@functools.lru_cache(1024)
def _share(text: str) -> Fraction:
    found = share(text, BUDGET)
    if not found:
        raise OptionError(f"{BUDGET}={text}: expected a share of the prompt above 0, at most 1")
    return found


def _check_chunk(chunk: Any, window: int) -> None:
    if chunk is not None and not (type(chunk) is int and chunk >= window):
        raise OptionError(
            f"{CHUNK}={chunk!r}: expected a whole number of tokens, at least the window ({window})"
        )


def _check_policy(config: StarKVConfig) -> None:
    policy = config.policy
    ours = type(policy) in POLICIES.values()
    if config.is_uneven or policy.observers or (ours and type(policy) not in SERVED):
        raise OptionError(
            f"policy={policy.name!r} does not work in vLLM: it needs hidden states, earlier "
            "queries, a state between prompts, or layers that keep different numbers of tokens; "
            f"use one of {', '.join(kind.name for kind in SERVED)}"
        )
