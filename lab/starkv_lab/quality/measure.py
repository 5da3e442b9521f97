"""Measures one cell: a variant at a budget, over all prompts of a design."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from starkv_compile import StarKVCache

from ..agent.checkpoints import load_agent
from .cells import Cell
from .design import ASKINGS, COLUMNS, Design
from .prompts import make_prompts
from .readers import Reader, Seen
from .variants import Variant


@dataclass(frozen=True)
class Reference:
    """Holds what the full cache gave for each continuation of one batch.

    chosen: the chosen tokens [B, judged] of each. logs: log-probabilities [B, judged, vocabulary]
    of each. attention: [B, layers, G, L], the attention of the reply to the prompt; it sums to 1.
    """

    seen: Seen
    chosen: tuple[torch.Tensor, ...]
    logs: tuple[torch.Tensor, ...]
    attention: torch.Tensor


class Judged(NamedTuple):
    """Judges one continuation of a batch, with arrays [B].

    right: whether the answer is right. same: whether every token is the full cache's choice. kl:
    distance from the full cache's distribution, in nats per token.
    """

    right: np.ndarray
    same: np.ndarray
    kl: np.ndarray


class Bench:
    """Draws all prompts of a design and answers them from the full cache."""

    def __init__(
        self,
        design: Design,
        checkpoint: Path | None = None,
        advance: Callable[[], Any] = lambda: None,
    ) -> None:
        self.design = design
        self.reader = Reader(load_agent(checkpoint)[0], load_agent(checkpoint)[0])
        self.batches: list[Reference] = []
        for number in range(len(design.batches())):
            self.batches.append(self._refer(self.reader.see(make_prompts(design, number))))
            advance()

    def _refer(self, seen: Seen) -> Reference:
        cache, continuations = self.reader.read(seen), seen.prompts.continuations
        logs = tuple(self.reader.go_on(cache, seen, what).log_softmax(-1) for what in continuations)
        attention = self.reader.attended(cache, seen, continuations[COLUMNS.index("reply")])
        attention = attention[..., : cache.get_seq_length()]
        attention = attention / attention.sum(-1, keepdim=True)
        return Reference(seen, tuple(part.argmax(-1) for part in logs), logs, attention)

    def measure(
        self, variant: Variant, budget: float, advance: Callable[[], Any] = lambda: None
    ) -> Cell:
        """Measures the cell of `variant` at `budget`.

        Raises:
            StarKVError: a cache was not compacted to the budget.
        """
        right: list[np.ndarray] = []
        same: list[np.ndarray] = []
        divergence: list[np.ndarray] = []
        recall = []
        with self.reader.reading(variant, budget, self.batches[0].seen) as metered:
            for batch in self.batches:
                cache = self.changed(metered.read(batch.seen))
                recall.append(_recall(batch.attention, cache))
                judged = [self._judge(batch, cache, i) for i in range(len(COLUMNS))]
                right.append(np.stack([one.right for one in judged], 1))
                same.append(np.stack([one.same for one in judged], 1))
                divergence.append(np.stack([one.kl for one in judged], 1))
                advance()
        kl = np.concatenate(divergence)
        ways = np.array(COLUMNS)
        return Cell(
            variant=variant.name,
            budget=budget,
            options=variant.config(budget).describe(),
            right=np.concatenate(right),
            same=np.concatenate(same),
            kl={way: float(kl[:, ways == way].mean()) for way in ASKINGS},
            recall=float(np.mean(recall)),
            nbytes=metered.nbytes,
            full_nbytes=metered.full_nbytes,
            seconds=metered.seconds,
        )

    def changed(self, cache: StarKVCache) -> StarKVCache:
        """The cache that answers are judged from. An experiment may override this."""
        return cache

    def _judge(self, batch: Reference, cache: StarKVCache, i: int) -> Judged:
        what = batch.seen.prompts.continuations[i]
        logs = self.reader.go_on(cache, batch.seen, what).log_softmax(-1)
        chosen = logs.argmax(-1)
        right = (chosen == what.ids[:, -what.judged :]).all(1)
        same = (chosen == batch.chosen[i]).all(1)
        full = batch.logs[i]
        kl = (full.exp() * (full - logs)).sum(-1).mean(-1)
        return Judged(right.numpy(), same.numpy(), kl.numpy())


def _recall(attention: torch.Tensor, cache: StarKVCache) -> float:
    """Returns the share of the full cache's attention, during its reply, to tokens still stored."""
    shares = []
    for number, layer in enumerate(cache.compressed_layers):
        if layer.kept is None or layer.stored == layer.seen:
            shares.append(1.0)
        else:
            by_head = attention[:, number]
            kept = layer.kept if layer.kept.dim() == 3 else layer.kept[:, None]
            kept = kept.expand(-1, by_head.shape[1], -1)
            shares.append(float(by_head.gather(2, kept).sum(2).mean()))
    return sum(shares) / len(shares)
