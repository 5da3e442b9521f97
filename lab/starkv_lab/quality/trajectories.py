"""Measures trajectories of an agent, each on one cache.

`bench quality` compacts every prompt once. It cannot show what happens over steps: stored tokens
compete with new tokens, a policy keeps state, and text accumulates. Here a session sees a
screenshot and answers a question at each step. Questions ask about the newest screenshots, which
are all that the session keeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from starkv_compile import AgentSession, StarKVConfig, compile, undo

from ..agent.checkpoints import load_agent
from ..demo.turns import Turn
from ..demo.ways import MAX_REPLY
from .cells import Cell
from .design import Trajectories
from .variants import FULL, Variant


class Answers(NamedTuple):
    """Holds replies, right answers and stored bytes of each step, and seconds of a trajectory."""

    replies: list[str]
    right: list[bool]
    nbytes: list[int]
    seconds: float


class TrajectoryBench:
    """Draws all trajectories of a design and answers them with the full cache."""

    def __init__(
        self,
        design: Trajectories,
        checkpoint: Path | None = None,
        advance: Callable[[], Any] = lambda: None,
    ) -> None:
        self.design = design
        self.model, self.processor = load_agent(checkpoint)
        self.turns = [design.turns(number) for number in range(design.prompts)]
        self.full = self._run(FULL.config(1.0), advance)

    def measure(
        self, variant: Variant, budget: float, advance: Callable[[], Any] = lambda: None
    ) -> Cell:
        """Measures the cell of `variant` at `budget`, a share of the session's tokens."""
        config = variant.config(budget)
        found = self.full if variant is FULL else self._run(config, advance)
        pairs = list(zip(found, self.full, strict=True))
        return Cell(
            variant=variant.name,
            budget=budget,
            options=config.describe(),
            right=np.array([one.right for one in found]),
            same=np.array([np.equal(one.replies, full.replies) for one, full in pairs]),
            kl={},
            recall=float("nan"),
            nbytes=sum(sum(one.nbytes) for one in found),
            full_nbytes=sum(sum(full.nbytes) for full in self.full),
            seconds=sum(one.seconds for one in found),
        )

    def _run(self, config: StarKVConfig, advance: Callable[[], Any]) -> list[Answers]:
        torch._dynamo.reset()  # lets go of the last configuration's graphs
        compile(self.model, config)
        found = []
        try:
            for turns in self.turns:
                found.append(self._answer(turns))
                advance()
        finally:
            undo(self.model)
        return found

    def _answer(self, turns: list[Turn]) -> Answers:
        session = AgentSession(self.model, self.processor, self.design.history, keep_text=False)
        replies, nbytes, start = [], [], time.process_time()
        for turn in turns:
            replies.append(session.step(turn.content, max_new_tokens=MAX_REPLY, do_sample=False))
            nbytes.append(session.cache.nbytes)
        seconds = time.process_time() - start
        asked = [turn.question for turn in turns]
        right = [q is not None and q.is_right(r) for q, r in zip(asked, replies, strict=True)]
        return Answers(replies, right, nbytes, seconds)
