"""Counters in vLLM's own Prometheus endpoint."""

from __future__ import annotations

import functools
from typing import Any

NAMES = {
    "starkv:prompts": "Prompts that are compacted",
    "starkv:prompt_tokens": "Tokens of prompts that are compacted",
    "starkv:kept_tokens": "Tokens of these that stay",
    "starkv:freed_blocks": "Blocks that compaction frees",
}


class Counters:
    """The counters of a process that takes requests.

    They count when a request is accepted: what becomes of it follows from its length.
    """

    def __init__(self) -> None:
        from prometheus_client import Counter

        self.by_name: dict[str, Any] = {name: Counter(name, help) for name, help in NAMES.items()}

    @staticmethod
    @functools.cache
    def of_process() -> Counters:
        return Counters()

    def count(self, length: int, skip: int, block: int, samples: int) -> None:
        """Counts a prompt of `length` tokens that loses `skip` of them, once for each sample.

        skip: 0 if all of them stay. Such a prompt is not counted.
        """
        if not skip:
            return
        amounts = (samples * n for n in (1, length, length - skip, skip // block))
        for counter, amount in zip(self.by_name.values(), amounts, strict=True):
            counter.inc(amount)
