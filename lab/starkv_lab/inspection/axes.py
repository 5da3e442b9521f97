"""A layer's score taken apart: what each axis gives every token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from starkv_compile.kernels.reference import Scores
from starkv_compile.policies import Policy, ScoreInputs, ScreenNovelty, StarKV


class Axis(NamedTuple):
    """values: [P] float32, of the tokens before the window.

    title and about are for people. is_factor: whether the score so far is multiplied by it.
    """

    name: str
    title: str
    about: str
    is_factor: bool
    values: torch.Tensor


def axes_of(policy: Policy, inputs: ScoreInputs) -> list[Axis]:
    """The axes of a policy's score of the only row, the final score last."""
    parts = AXES.get(type(policy), _attention_alone)(policy, inputs)
    scores = policy.score(inputs).scores[0]
    final = scores.mean(0) if scores.dim() == 2 else scores
    about = "what tokens are ranked by" + (", mean over KV heads" if policy.per_head else "")
    past = parts[0].values.shape[-1]
    return [*parts, Axis("final", "Final score", about, False, final[:past])]


def _attention_alone(policy: Policy, inputs: ScoreInputs) -> list[Axis]:
    return [
        Axis(
            "attention",
            "Attention",
            "what the last queries pay to the token, mean over heads",
            False,
            inputs.window_attention()[0].mean(0),
        )
    ]


def _novelty_axes(policy: Policy, inputs: ScoreInputs) -> list[Axis]:
    """Of a screen's token, rank in: space * time * (1 + attention_weight * attention / mean)."""
    (attention,) = _attention_alone(policy, inputs)
    past = attention.values.shape[-1]
    return [
        attention,
        Axis(
            "space",
            "Novelty in space",
            "how unlike its neighbours on the screen; text: 1",
            True,
            inputs.spatial_novelty()[0, :past],
        ),
        Axis(
            "time",
            "Novelty in time",
            "how unlike the newest screen at the same place, older screens only",
            True,
            inputs.temporal_novelty()[0, :past],
        ),
        Axis(
            "text",
            "Novelty of text",
            "how unlike all other text; screens: 0",
            True,
            inputs.key_novelty(inputs.layout[0] < 0)[0, :past],
        ),
    ]


def _star_axes(policy: StarKV, inputs: ScoreInputs) -> list[Axis]:
    """(attention + boost) * entropy * spatial * temporal is the final score.

    One axis is switched off after the other, so that each is what the reference makes of it.
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
            "what the last queries pay to the token and its neighbours, mean over heads",
            False,
            attention,
        ),
        Axis(
            "boost",
            "Screen boost",
            "added to the current frame's tokens, by the norm of their hidden state",
            False,
            boosted - attention,
        ),
        Axis(
            "spatial",
            "Spatial prior",
            "weight of the head that attends most to the token, by how much its attention tells "
            "about places on the screen",
            True,
            _ratio(spatial, base),
        ),
        Axis(
            "temporal",
            "Temporal discount",
            "older frames count less",
            True,
            _ratio(temporal, spatial),
        ),
        Axis(
            "entropy",
            "Entropy",
            "heads sharpened or flattened by how spread they are",
            True,
            shaped,
        ),
    ]


def _ratio(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """1 where there was nothing to multiply."""
    return torch.where(before == 0, 1.0, after / before)


AXES: dict[type[Policy], Callable[[Any, ScoreInputs], list[Axis]]] = {
    ScreenNovelty: _novelty_axes,
    StarKV: _star_axes,
}
"""Of policies that have more than attention; the final score comes on top."""
