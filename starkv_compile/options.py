"""The flat options of the backend, for type checkers and editors."""

from __future__ import annotations

from typing import TypedDict

from .policies import Policy


class Options(TypedDict, total=False):
    """Values of `StarKVConfig`, and those of this package's policies.

    Their meaning, limits and defaults are those of the fields. A policy of yours takes its own
    options in its class: `policy=Mine(weight=2)`.
    """

    # of StarKVConfig
    budget: float
    budget_tokens: int | None
    budget_bytes: int | None
    layer_budgets: tuple[float, ...] | None
    decode_tokens: int | None
    window: int
    nbits: int
    policy: Policy | str
    inner: str
    regional_compilation: bool
    shorten_outputs: bool
    debug: bool

    # of policies
    attention_weight: float
    boost: float
    boost_temperature: float
    decay_warm_steps: int
    entropy: str
    entropy_high: float
    entropy_low: float
    frame_decay: float
    frame_floor: float
    grid: str
    mi_decay: float
    mi_ramp_steps: int
    mi_temperature: float
    mi_warm_steps: int
    mi_weight: float
    novelty_weight: float
    pattern_decay: float
    pool: int
    stability_floor: float
    stored_attention: bool
    text_weight: float
