"""Counters in vLLM's own Prometheus endpoint."""

from __future__ import annotations

import functools
from typing import Any

OF_REQUESTS = {
    "starkv:prompts": "Prompts that are compacted",
    "starkv:prompt_tokens": "Tokens of prompts that are compacted",
    "starkv:kept_tokens": "Tokens of these that stay",
    "starkv:freed_blocks": "Blocks that compaction frees",
}
"""Counted when a request is accepted: what becomes of it follows from its length."""

OF_LAYERS = {
    "starkv:compactions": "Compactions of one prompt in one layer",
    "starkv:compaction_seconds": "Seconds of the host in these",
}
"""Counted by the workers. Prometheus sees them if `PROMETHEUS_MULTIPROC_DIR` is set."""


@functools.cache
def of_requests() -> dict[str, Any]:
    """This process's counters of `OF_REQUESTS`, by name."""
    return _counters(OF_REQUESTS)


@functools.cache
def of_layers() -> dict[str, Any]:
    """This process's counters of `OF_LAYERS`, by name."""
    return _counters(OF_LAYERS)


def _counters(named: dict[str, str]) -> dict[str, Any]:
    from prometheus_client import Counter

    return {name: Counter(name, help) for name, help in named.items()}


def count_prompt(length: int, skip: int, block: int, samples: int) -> None:
    """Counts a prompt of `length` tokens that loses `skip` of them, once for each sample.

    skip: 0 if all of them stay. Such a prompt is not counted.
    """
    if skip:
        amounts = (samples * n for n in (1, length, length - skip, skip // block))
        for counter, amount in zip(of_requests().values(), amounts, strict=True):
            counter.inc(amount)


def count_compactions(number: int, seconds: float) -> None:
    """Counts what one layer has done in one step."""
    for counter, amount in zip(of_layers().values(), (number, seconds), strict=True):
        counter.inc(amount)
