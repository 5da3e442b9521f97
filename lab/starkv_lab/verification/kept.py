"""Compares the tokens that a device keeps with those that the reference keeps on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from starkv_compile.kernels.reference import best_first, split_capacity
from starkv_compile.policies import Policy, ScoreInputs

from .sessions import Stored


@dataclass(frozen=True)
class Expected:
    """Holds what the reference computes for one layer of one prompt.

    scores: [rows, P] of the tokens before the window, a row for each set of tokens. places:
    [rows, L], each token's place in the session. selected: how many of the P stay.
    """

    scores: torch.Tensor
    places: torch.Tensor
    selected: int

    @classmethod
    def of(cls, policy: Policy, inputs: ScoreInputs) -> Expected:
        """Scores a copy of the layer's inputs on the CPU, in float64 where the policy allows it."""
        given = {field.name: _on_cpu(getattr(inputs, field.name)) for field in fields(inputs)}
        inputs = ScoreInputs(**given)
        length = inputs.key.shape[2]
        selected, window = split_capacity(length, inputs.window, inputs.capacity)
        scores = policy.score(inputs).scores[..., : length - window].flatten(0, -2)
        place = torch.arange(length)[None] if inputs.index is None else inputs.index.flatten(0, -2)
        return cls(scores, place.expand(len(scores), -1), selected)


@dataclass(frozen=True)
class Agreement:
    """Says how well kept tokens agree with the reference.

    compared, same: numbers of tokens, over all prompts, layers and heads, without the window. gap:
    the largest distance of another token's score from the threshold of the reference, in standard
    deviations of the scores.
    """

    compared: int
    same: int
    gap: float


def agreement(expected: Sequence[Expected], stored: Sequence[Stored]) -> Agreement:
    """Compares layers of prompts with the layers' contents after each prompt."""
    compared = same = 0
    gap = 0.0
    for wanted, layer in zip(expected, stored, strict=True):
        assert layer.kept is not None
        rows = layer.kept.cpu().flatten(0, -2)
        order = best_first(wanted.scores, None)[:, : wanted.selected]
        for row, scores, places, chosen in zip(
            rows, wanted.scores, wanted.places, order, strict=True
        ):
            has = torch.isin(places[: len(scores)], row)
            should = torch.zeros_like(has)
            should[chosen] = True
            compared += int(should.sum())
            same += int((should & has).sum())
            if bool((has != should).any()):
                distance = (scores[has != should] - scores[chosen].min()).abs().max()
                gap = max(gap, float(distance / scores.std()))
    return Agreement(compared, same, gap)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        parts = [_on_cpu(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
