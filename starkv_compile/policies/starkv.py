"""The STaR-KV policy: window attention weighed by screen, time and entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..kernels.ops import STARKV, score_after_each_axis
from ..kernels.reference.spatial import REFERENCE
from ..kernels.reference.star import Scores, StarOptions
from .base import Policy
from .inputs import Scored, ScoreInputs


@dataclass(frozen=True, kw_only=True)
class StarKV(StarOptions, Policy):
    """STaR-KV (arXiv 2606.01790), in the form that its options ask for.

    `StarKVConfig.paper()` is the form that its authors released. `kernels.reference.star` has the
    formulas.
    """

    name: ClassVar[str] = "starkv"

    def score(self, inputs: ScoreInputs) -> Scored:
        scored = STARKV.star_scores(*self.arguments(inputs))
        return Scored(scored[0], (scored[1], scored[2], scored[3], scored[4]))

    def after_each_axis(self, inputs: ScoreInputs) -> Scores:
        """The score after each axis, of real tensors, by the reference: for people to look at."""
        return score_after_each_axis(REFERENCE, *self.arguments(inputs))

    def arguments(self, inputs: ScoreInputs) -> tuple[Any, ...]:
        """What `starkv.star_scores` is called with."""
        return (
            inputs.window_attention(),
            inputs.hidden,
            inputs.real,
            *inputs.layout,
            *inputs.state,
            *self.scalars(),
        )
