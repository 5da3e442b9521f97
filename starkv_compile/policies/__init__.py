"""Policies: how tokens are scored. Selection and compaction are the same for all of them.

A policy is built from a `StarKVConfig` and has one method, `score`. It is called while a graph
is rewritten, on proxies of the graph's values, so it may use torch functions and `torch.ops`,
index tuples, and no Python control flow on values or shapes. To add one: a class in a file of
its own, and a line in `POLICIES`.
"""

from __future__ import annotations

from typing import Protocol

from ..config import StarKVConfig
from .inputs import Scored, ScoreInputs
from .starkv import StarKV


class Policy(Protocol):
    """Scores the tokens of one layer."""

    def __init__(self, config: StarKVConfig) -> None: ...

    def score(self, inputs: ScoreInputs) -> Scored:
        """Scores [B, P] float32, higher = more important, and the layer's new state."""
        ...


POLICIES: dict[str, type[Policy]] = {"starkv": StarKV}

__all__ = ["POLICIES", "Policy", "ScoreInputs", "Scored", "StarKV"]
