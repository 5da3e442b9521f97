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
    """STaR-KV (arXiv 2606.01790): window attention, weighed by screen, time and entropy.

    The defaults are this project's. `StarKVConfig.paper()` is the form that the authors released.
    `kernels.reference.star` has the formulas. Symbols in brackets are the paper's.
    """

    name: ClassVar[str] = "starkv"

    def score(self, inputs: ScoreInputs) -> Scored:
        scored = STARKV.star_scores(*self.arguments(inputs))
        return Scored(scored[0], (scored[1], scored[2], scored[3], scored[4]))

    def after_each_axis(self, inputs: ScoreInputs) -> Scores:
        """Returns the score after each axis, computed on tensors by the reference."""
        return score_after_each_axis(REFERENCE, *self.arguments(inputs))

    def arguments(self, inputs: ScoreInputs) -> tuple[Any, ...]:
        """Returns the arguments of the op `starkv.star_scores`."""
        return (
            inputs.window_attention(),
            inputs.hidden,
            inputs.real,
            *inputs.layout,
            *inputs.state,
            *self.scalars(),
        )
