"""What a page shows of a prompt: its tokens' ranks, scores by axis, and places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from starkv_compile import StarKVCache, StarKVConfig, UnsupportedModel
from starkv_compile.cache import StarKVLayer, token_bytes
from starkv_compile.kernels.reference import best_first, layer_capacity, split_capacity
from starkv_compile.policies import ScoreInputs

from .axes import Axis, axes_of
from .capture import capture
from .prompt import InspectedPrompt


@dataclass(frozen=True)
class Budget:
    """What one share of the tokens comes to.

    kept, window: of each layer, tokens kept and how many of them are kept whatever their score.
    ranks: [layers, heads, L] int64, the best 0; those below `kept` are kept, the window's first.
    heads is 1 where a layer keeps one set.
    """

    share: float
    kept: tuple[int, ...]
    window: tuple[int, ...]
    ranks: torch.Tensor

    def places(self, layer: int, head: int = 0) -> list[int]:
        """Tokens kept, in their order in the prompt. layer: counted among those compressed."""
        return (self.ranks[layer, head] < self.kept[layer]).nonzero()[:, 0].tolist()


@dataclass(frozen=True)
class Inspection:
    """All of it, for layers that are compressed.

    frame, row, column: [L] int64; frame is -1 for text. layers: their numbers in the model.
    token_bytes: of one token in each. axes: values [layers, L], NaN where a token has no score.
    """

    prompt: InspectedPrompt
    config: StarKVConfig
    frame: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    layers: tuple[int, ...]
    token_bytes: tuple[int, ...]
    budgets: tuple[Budget, ...]
    axes: tuple[Axis, ...]


@torch.no_grad()
def collect(prompt: InspectedPrompt, config: StarKVConfig, shares: Sequence[float]) -> Inspection:
    """Run the prompt once and rank its tokens for each budget.

    Ranks and axes are what the package's own selection and scores make of the values that the
    compiled model's scores read. Axes are those of the first budget: some policies' scores depend
    on it.

    Args:
        shares: of the tokens that stay, less than 1; the first is what the run itself keeps.

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
            f"({'; '.join(str(report).splitlines())})"
        )
    tokens, seen = prompt.inputs["input_ids"].shape[1], stored[0][1].seen
    if tokens != seen:
        raise UnsupportedModel(
            f"{prompt.model_name}: stores {seen} tokens of a prompt of {tokens}, so that it is not "
            "known which are which"
        )
    frame, row, column = notes.layout
    return Inspection(
        prompt=prompt,
        config=config,
        frame=frame,
        row=row,
        column=column,
        layers=tuple(number for number, _ in stored),
        token_bytes=tuple(token_bytes(layer) for _, layer in stored),
        budgets=tuple(notes.budget(i) for i in range(len(configs))),
        axes=notes.stacked_axes(),
    )


class _Ranking(NamedTuple):
    """One layer at one budget; as in `Budget`, ranks [heads, L]."""

    kept: int
    window: int
    ranks: torch.Tensor


class _Notes:
    """Takes what scoring reads, layer by layer, and keeps only what is shown of it."""

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
        """As `InsertScores` has it."""
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
        """The axes of all layers, each [layers, L]."""
        length = self.layout[0].shape[0]
        return tuple(
            same[0]._replace(values=torch.stack([_padded(axis.values, length) for axis in same]))
            for same in zip(*self.axes, strict=True)
        )


def _padded(values: torch.Tensor, length: int) -> torch.Tensor:
    """[L] of [P]: NaN for tokens that have no score."""
    return F.pad(values.float().cpu(), (0, length - len(values)), value=torch.nan)
