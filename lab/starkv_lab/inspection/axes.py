"""Takes a layer's score apart into axes, such as attention and novelty."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from starkv_compile.kernels.reference import Scores
from starkv_compile.policies import Policy, ScoreInputs, ScreenNovelty, StarKV


class Axis(NamedTuple):
    """Holds what one part of a score gives each token.

    title, about: texts of the page. is_factor: whether the score so far is multiplied by the
    values, or they are added. values: [P] float32, one for each token before the window.
    """

    name: str
    title: str
    about: str
    is_factor: bool
    values: torch.Tensor


def axes_of(policy: Policy, inputs: ScoreInputs) -> list[Axis]:
    """Returns the axes of a policy's score for a batch of one row. The final score comes last."""
    parts = AXES.get(type(policy), _attention_alone)(policy, inputs)
    scores = policy.score(inputs).scores[0]
    final = scores.mean(0) if scores.dim() == 2 else scores
    about = "the score that ranks tokens" + (", mean over KV heads" if policy.per_head else "")
    past = parts[0].values.shape[-1]
    return [*parts, Axis("final", "Final score", about, False, final[:past])]


def _attention_alone(policy: Policy, inputs: ScoreInputs) -> list[Axis]:
    return [
        Axis(
            "attention",
            "Attention",
            "attention of the last queries to the token, mean over heads",
            False,
            inputs.window_attention()[0].mean(0),
        )
    ]


def _novelty_axes(policy: Policy, inputs: ScoreInputs) -> list[Axis]:
    """A screen's token ranks by space * time * (1 + attention_weight * attention / its mean)."""
    (attention,) = _attention_alone(policy, inputs)
    past = attention.values.shape[-1]
    return [
        attention,
        Axis(
            "space",
            "Novelty in space",
            "how much the token differs from its neighbours on the screen; 1 for text",
            True,
            inputs.spatial_novelty()[0, :past],
        ),
        Axis(
            "time",
            "Novelty in time",
            "how much a token of an older screen differs from the newest screen at the same place",
            True,
            inputs.temporal_novelty()[0, :past],
        ),
        Axis(
            "text",
            "Novelty of text",
            "how much the token differs from all other text; 0 for screens",
            True,
            inputs.key_novelty(inputs.layout[0] < 0)[0, :past],
        ),
    ]


def _star_axes(policy: StarKV, inputs: ScoreInputs) -> list[Axis]:
    """The final score is (attention + boost) * entropy * spatial * temporal.

    The function switches off one axis after another, so that the reference itself computes each.
    """

    def scores(**changes: Any) -> Scores:
        return dataclasses.replace(policy, **changes).after_each_axis(inputs)

    attention = scores(boost=0.0, entropy="off").group[0].mean(0)
    boosted = scores(entropy="off").group[0].mean(0)
    full = scores()
    base, spatial, temporal = full.group[0].mean(0), full.spatial[0], full.temporal[0]
    shaped = _ratio(base, boosted)
    if policy.entropy == "global":
        shaped = _ratio(full.final[0], temporal)
    return [
        Axis(
            "attention",
            "Attention",
            "attention of the last queries to the token and its neighbours, mean over heads",
            False,
            attention,
        ),
        Axis(
            "boost",
            "Screen boost",
            "score added to the tokens of the current frame, in proportion to the norm of their "
            "hidden state",
            False,
            boosted - attention,
        ),
        Axis(
            "spatial",
            "Spatial prior",
            "weight of the head that attends most to the token; a head weighs more the more its "
            "attention depends on the place on the screen",
            True,
            _ratio(spatial, base),
        ),
        Axis(
            "temporal",
            "Temporal discount",
            "discount of older frames",
            True,
            _ratio(temporal, spatial),
        ),
        Axis(
            "entropy",
            "Entropy",
            "change from sharpening or flattening each head by how widely its attention spreads",
            True,
            shaped,
        ),
    ]


def _ratio(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The factor between the two, or 1 where `before` is 0."""
    return torch.where(before == 0, 1.0, after / before)


AXES: dict[type[Policy], Callable[[Any, ScoreInputs], list[Axis]]] = {
    ScreenNovelty: _novelty_axes,
    StarKV: _star_axes,
}
"""Axes of the policies whose score has more parts than attention, without the final score."""
