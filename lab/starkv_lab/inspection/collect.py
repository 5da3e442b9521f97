"""Collects what the page shows of a prompt: ranks, scores by axis, and places of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from starkv_compile import StarKVCache, StarKVConfig, UnsupportedModel
from starkv_compile.cache import StarKVLayer
from starkv_compile.kernels.reference import (
    TokenBytes,
    best_first,
    layer_capacity,
    split_capacity,
)
from starkv_compile.policies import ScoreInputs

from .axes import Axis, axes_of
from .capture import capture
from .prompt import InspectedPrompt


@dataclass(frozen=True)
class Budget:
    """Holds what one share of the tokens keeps.

    kept: number of tokens that each layer keeps. window: how many of these are the last tokens,
    which stay whatever their score. ranks: [layers, heads, L] int64. The best rank is 0, the
    window's tokens come first, and tokens whose rank is below `kept` are kept. heads is 1 where a
    layer keeps one set for all heads.
    """

    share: float
    kept: tuple[int, ...]
    window: tuple[int, ...]
    ranks: torch.Tensor

    def places(self, layer: int, head: int = 0) -> list[int]:
        """The kept tokens in the order of the prompt. `layer` counts compressed layers only."""
        return (self.ranks[layer, head] < self.kept[layer]).nonzero()[:, 0].tolist()


@dataclass(frozen=True)
class Inspection:
    """Holds everything that the page shows, for the layers that are compressed.

    frame, row, column: [L] int64, the place of each token; frame is -1 for text. layers: the
    layers' numbers in the model. token_bytes: what tokens take in each layer. axes: their values
    are [layers, L], and NaN where a token has no score.
    """

    prompt: InspectedPrompt
    config: StarKVConfig
    frame: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    layers: tuple[int, ...]
    token_bytes: tuple[TokenBytes, ...]
    budgets: tuple[Budget, ...]
    axes: tuple[Axis, ...]

    def nbytes(self, budget: Budget, layer: int) -> int:
        """Bytes that a layer keeps. `layer` counts compressed layers only."""
        full, coded, shared = self.token_bytes[layer]
        kept = budget.kept[layer]
        if self.config.nbits == 16 or kept <= self.config.scoring_window:
            return kept * full
        in_full = self.config.scoring_window
        return in_full * full + (kept - in_full) * coded + shared


@torch.no_grad()
def collect(prompt: InspectedPrompt, config: StarKVConfig, shares: Sequence[float]) -> Inspection:
    """Runs the prompt once and ranks its tokens for each budget.

    The function takes the values that the compiled model scores, and gives them to the package's
    own scores and selection. The axes belong to the first budget, because the scores of some
    policies depend on the budget.

    Args:
        shares: shares of the tokens that stay, each below 1. The run itself uses the first.

    Raises:
        OptionError: a share or an option is impossible.
        UnsupportedModel: a layer cannot be compressed, or stores other tokens than the prompt's.
    """
    configs = [replace(config, budget=share, inner="eager") for share in shares]
    layers = len(StarKVCache(prompt.model.config).compressed_layers)
    notes = _Notes(configs, layers)
    cache, report = capture(prompt.model, prompt.inputs, configs[0], notes.take)
    stored = [
        (number, layer)
        for number, layer in enumerate(cache.layers)
        if isinstance(layer, StarKVLayer)
    ]
    if not stored or len(stored) != len(notes.axes):
        raise UnsupportedModel(
            f"{prompt.model_name}: {len(notes.axes)} of {len(stored)} layers can be compressed "
            f"({'; '.join(str(report).splitlines())}); the page needs all of them"
        )
    tokens, seen = prompt.inputs["input_ids"].shape[1], stored[0][1].seen
    if tokens != seen:
        raise UnsupportedModel(
            f"{prompt.model_name} stores {seen} tokens for a prompt of {tokens} tokens, so the "
            "page cannot match them; it needs a model that stores each token of its prompt"
        )
    frame, row, column = notes.layout
    return Inspection(
        prompt=prompt,
        config=config,
        frame=frame,
        row=row,
        column=column,
        layers=tuple(number for number, _ in stored),
        token_bytes=tuple(
            TokenBytes.of(*layer.tokens_in_full(), config.nbits) for _, layer in stored
        ),
        budgets=tuple(notes.budget(i) for i in range(len(configs))),
        axes=notes.stacked_axes(),
    )


class _Ranking(NamedTuple):
    """Holds one layer at one budget, as `Budget` does; ranks are [heads, L]."""

    kept: int
    window: int
    ranks: torch.Tensor


class _Notes:
    """Takes the inputs of each layer's score, and keeps what the page shows of them."""

    def __init__(self, configs: Sequence[StarKVConfig], layers: int) -> None:
        self.configs = configs
        self.policy = configs[0].policy
        self.weights = configs[0].layer_weights(layers) if configs[0].is_uneven else None
        self.layout: tuple[torch.Tensor, ...] = ()
        self.axes: list[list[Axis]] = []
        self.rankings: list[list[_Ranking]] = []

    def take(self, inputs: ScoreInputs) -> None:
        by_head = inputs.layout[0].dim() == 3
        self.layout = tuple((t[0, 0] if by_head else t[0]).cpu() for t in inputs.layout[:3])
        each = [replace(inputs, capacity=self._capacity(c, inputs)) for c in self.configs]
        self.rankings.append([self._rank(given) for given in each])
        self.axes.append(axes_of(self.policy, each[0]))

    def _capacity(self, config: StarKVConfig, inputs: ScoreInputs) -> int:
        """Counts the tokens that a layer keeps, as the pass `InsertScores` does."""
        length = inputs.key.shape[2]
        capacity = config.capacity(length)
        if self.weights is None:
            return capacity
        place = len(self.rankings)
        return layer_capacity(length, inputs.window, capacity, self.weights, place)

    def _rank(self, inputs: ScoreInputs) -> _Ranking:
        length = inputs.key.shape[2]
        selected, window = split_capacity(length, inputs.window, inputs.capacity)
        past = length - window
        scores = self.policy.score(inputs).scores[..., :past]
        scores = scores.flatten(0, -2)  # heads of the only row
        real = None if inputs.real is None else inputs.real.expand(len(scores), -1)
        order = best_first(scores, real).cpu()
        ranks = torch.arange(length).repeat(len(scores), 1)
        ranks[:, past:] = ranks[:, :window]
        ranks[:, :past].scatter_(1, order, window + torch.arange(past).expand_as(order))
        return _Ranking(selected + window, window, ranks)

    def budget(self, number: int) -> Budget:
        kept, window, ranks = zip(*(layer[number] for layer in self.rankings), strict=True)
        return Budget(self.configs[number].budget, kept, window, torch.stack(ranks))

    def stacked_axes(self) -> tuple[Axis, ...]:
        """Stacks the axes of all layers; each has values [layers, L]."""
        length = self.layout[0].shape[0]
        return tuple(
            same[0]._replace(values=torch.stack([_padded(axis.values, length) for axis in same]))
            for same in zip(*self.axes, strict=True)
        )


def _padded(values: torch.Tensor, length: int) -> torch.Tensor:
    """Fills [P] up to [L] with NaN, for tokens that have no score."""
    return F.pad(values.float().cpu(), (0, length - len(values)), value=torch.nan)
