"""Runs the same turns with a full and with compressed caches, and measures each run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from starkv_compile import AgentSession, OptionError, StarKVCache, StarKVConfig

from ..environment import peak_bytes
from .runtimes import in_onnx, in_torch
from .turns import Turn

MAX_REPLY = 12  # tokens; the longest right answer has 10
RUNS = {"torch": 3, "onnx": 2}
"""Runs of each way: the first compiles, the second is timed, the third records memory."""


@dataclass(frozen=True)
class Way:
    """Holds one configuration, its title in tables, and its name in file names."""

    name: str
    title: str
    config: StarKVConfig


@dataclass(frozen=True)
class Measured:
    """Holds what one way answered and cost over all turns.

    stored, seen: tokens of one layer at the end. nbytes, full_nbytes: bytes of all keys and
    values, and bytes that a full cache would need for the tokens seen. peak_nbytes: most bytes
    that tensors of a run held at once, weights excluded; None in ONNX Runtime, whose memory torch
    does not see. first_token_seconds: mean over turns, from the question (and screenshot) to the
    first token of the reply. token_seconds: mean over the other tokens. first_run_seconds,
    run_seconds: all turns, with and without compilation.
    """

    way: Way
    replies: tuple[str, ...]
    cache: StarKVCache
    stored: int
    seen: int
    nbytes: int
    full_nbytes: int
    peak_nbytes: int | None
    first_token_seconds: float
    token_seconds: float
    first_run_seconds: float
    run_seconds: float


def ways(budget: float, inner: str, nbits: int = 16) -> tuple[Way, Way, Way]:
    """Returns the full cache, STaR-KV as released, and our defaults.

    The kept tokens of the last two are stored in `nbits`.

    All three are compiled, so that their times are comparable.

    Raises:
        OptionError: the budget is out of range, or keeps everything.
    """
    if budget == 1.0:
        raise OptionError(
            "budget=1.0 keeps everything, so there is nothing to compare; give less than 1"
        )
    share = f"{budget:.3g}" + (f", {nbits} bits" if nbits != 16 else "")
    options: dict[str, Any] = {"budget": budget, "nbits": nbits, "inner": inner}
    return (
        Way("full", "full cache", StarKVConfig(budget=1.0, inner=inner)),
        Way("paper", f"STaR-KV, budget {share}", StarKVConfig.paper(**options)),
        Way("default", f"default, budget {share}", StarKVConfig(**options)),
    )


def measure(
    way: Way,
    turns: Sequence[Turn],
    checkpoint: Path | None = None,
    advance: Callable[[], Any] = lambda: None,
    exported: Path | None = None,
    replied: Callable[[Turn, str], Any] | None = None,
) -> Measured:
    """Runs `turns` `RUNS` times, each time in a new session.

    Args:
        advance: called after every turn.
        exported: a folder that `export_agent` wrote. It replaces the checkpoint.
        replied: called with every turn of the first run and its reply.
    """
    with contextlib.ExitStack() as stack:
        if exported is None:
            agent = stack.enter_context(in_torch(way.config, checkpoint))
        else:
            agent = in_onnx(exported)
        return _measure(way, agent, turns, advance, replied, peak=exported is None)


def _measure(
    way: Way,
    agent: tuple[Any, Any],
    turns: Sequence[Turn],
    advance: Callable[[], Any],
    replied: Callable[[Turn, str], Any] | None,
    peak: bool,
) -> Measured:
    def run(
        replied: Callable[[Turn, str], Any] | None = None,
    ) -> tuple[AgentSession, tuple[str, ...], list[Clock]]:
        session, replies, clocks = AgentSession(*agent), [], []
        for turn in turns:
            clocks.append(Clock())
            reply = session.step(
                turn.content, max_new_tokens=MAX_REPLY, do_sample=False, streamer=clocks[-1]
            )
            replies.append(reply)
            if replied is not None:
                replied(turn, reply)
            advance()
        return session, tuple(replies), clocks

    started = time.perf_counter()
    run(replied)
    compiled = time.perf_counter()
    session, replies, clocks = run()
    finished = time.perf_counter()
    cache = session.cache
    layer = cache.compressed_layers[0]
    later = [seconds for clock in clocks for seconds in clock.later]
    return Measured(
        way=way,
        replies=replies,
        cache=cache,
        stored=layer.stored,
        seen=layer.seen,
        nbytes=cache.nbytes,
        full_nbytes=cache.full_nbytes,
        peak_nbytes=peak_bytes(run) if peak else None,
        first_token_seconds=sum(clock.first for clock in clocks) / len(clocks),
        token_seconds=sum(later) / max(1, len(later)),
        first_run_seconds=compiled - started,
        run_seconds=finished - compiled,
    )


class Clock(BaseStreamer):
    """Measures seconds from its creation to the first token of a reply, and between the others."""

    def __init__(self) -> None:
        self._times = [time.perf_counter()]
        self._prompt_given = False

    def put(self, value: torch.Tensor) -> None:
        """Receives the prompt first, then each token as `generate` chooses it."""
        if self._prompt_given:
            self._times.append(time.perf_counter())
        self._prompt_given = True

    def end(self) -> None:
        pass

    @property
    def first(self) -> float:
        return self._times[1] - self._times[0]

    @property
    def later(self) -> list[float]:
        return [after - before for before, after in pairwise(self._times[1:])]
