"""The STaR-KV policy: window attention weighed by screen, time and entropy."""

from __future__ import annotations

from typing import Any, ClassVar

from ..config import StarKVConfig
from ..kernels.ops import STARKV
from ..kernels.reference.star import Hyper
from .base import Policy
from .inputs import Scored, ScoreInputs


def hyper_of(config: StarKVConfig) -> Hyper:
    """The scalars scoring reads."""
    return Hyper(*(getattr(config, name) for name in Hyper._fields))


class StarKV(Policy):
    """arXiv 2606.01790, in the form `StarKVConfig` asks for."""

    reads: ClassVar[frozenset[str]] = frozenset(Hyper._fields)

    def score(self, inputs: ScoreInputs) -> Scored:
        scored = STARKV.star_scores(*self.arguments(inputs))
        return Scored(scored[0], (scored[1], scored[2], scored[3], scored[4]))

    def arguments(self, inputs: ScoreInputs) -> tuple[Any, ...]:
        """What `starkv.star_scores` is called with."""
        return (
            inputs.window_attention(),
            inputs.hidden,
            inputs.real,
            *inputs.layout,
            *inputs.state,
            *hyper_of(self.config),
        )
