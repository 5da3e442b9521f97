"""What a policy reads and returns. Values are tensors, or proxies of them in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class ScoreInputs:
    """One layer's values at a cache write. Shapes as in `kernels`.

    query [B, H, S, D], key [B, G, L, D]; mask and log_sum_exp as in `window_attention`; hidden
    [B, S, E] or None where the pass did not find it; real [B, L] bool, False at padding, or
    None; layout and state as in `reference.star`; window W before clipping; capacity C. sharing:
    how many of the key's heads are stored as one: scores and state have G / sharing subspaces.
    """

    query: Any
    key: Any
    mask: Any
    scale: float
    log_sum_exp: Any
    hidden: Any
    real: Any
    layout: tuple[Any, Any, Any, Any]
    state: tuple[Any, Any, Any, Any]
    window: int
    capacity: Any
    sharing: int = 1


class Scored(NamedTuple):
    scores: Any
    state: tuple[Any, Any, Any, Any]
