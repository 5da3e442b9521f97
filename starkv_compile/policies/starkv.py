"""The STaR-KV policy: window attention weighed by screen, time and entropy."""

from __future__ import annotations

from ..config import StarKVConfig
from ..kernels.ops import STARKV
from ..kernels.reference.star import Hyper
from .inputs import Scored, ScoreInputs


def hyper_of(config: StarKVConfig) -> Hyper:
    """The scalars scoring reads."""
    return Hyper(*(getattr(config, name) for name in Hyper._fields))


class StarKV:
    """arXiv 2606.01790, in the form `StarKVConfig` asks for."""

    def __init__(self, config: StarKVConfig) -> None:
        self.hyper = hyper_of(config)

    def score(self, inputs: ScoreInputs) -> Scored:
        attention = STARKV.window_attention(
            inputs.query, inputs.key, inputs.mask, inputs.scale, inputs.window, inputs.capacity,
            False, inputs.log_sum_exp,
        )  # fmt: skip
        if inputs.sharing > 1:
            attention = attention.unflatten(1, (-1, inputs.sharing)).mean(2)
        scored = STARKV.star_scores(
            attention,
            inputs.hidden,
            inputs.real,
            *inputs.layout,
            *inputs.state,
            *self.hyper,
        )
        return Scored(scored[0], (scored[1], scored[2], scored[3], scored[4]))
