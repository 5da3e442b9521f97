"""What the analysis passes find. Frozen: a later pass adds to a `Site` by replacing it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from ..kernels.reference.star import Layout, State

HIDDEN = -9984.0
"""An additive mask hides a key with at most this value: -1e4, as bfloat16 rounds it."""


@dataclass(frozen=True)
class Attention:
    """One attention of a prompt.

    Attributes:
        node: computes it.
        form: the name of its form.
        query: [B, H, S, D].
        key: [B, G, L, D], before heads are repeated.
        value: [B, G, L, D], before heads are repeated.
        mask: the mask, or None.
        causal: whether later keys are hidden from a query if there is no mask.
        scale: factor of the products of queries and keys.
        aligned_last: whether causal means that the last query sees the last key, as in
            FlashAttention.
        mask_hides: whether the mask is True where keys are hidden. If not, it is True where they
            are visible.
        mask_function: if the mask is a function of places, the module node and its further inputs.
        log_sum_exp: which of the node's results is the log-sum-exp of its logits [B, H, S].
    """

    node: Node
    form: str
    query: Node
    key: Node
    value: Node
    mask: Node | None
    causal: bool
    scale: Any
    aligned_last: bool = False
    mask_hides: bool = False
    mask_function: tuple[Node, ...] = ()
    log_sum_exp: int | None = None

    def at(self, node: Node) -> Attention:
        """The same attention, computed by `node`."""
        return replace(self, node=node)


@dataclass(frozen=True)
class CacheWrite:
    """Where key and value leave the graph to be cached.

    marker: the `starkv.cache_write` node; None if they are plain graph outputs. Key and value are
    those of the attention, or latents from which those are computed, token by token (multi-head
    latent attention).
    """

    key: Node
    value: Node
    marker: Node | None


@dataclass(frozen=True)
class Inserted:
    """Proxies of the values that `InsertScores` put into the graph, and the window that scored.

    place and novelty are as in `kernels.marker.Written`, by head if each head keeps a set.
    """

    scores: Any
    state: State
    place: Any
    novelty: Any
    real: Any
    capacity: Any
    window: Any


@dataclass(frozen=True)
class Site:
    """One decoder attention and all that was found about it. None: not found (yet)."""

    index: int
    attention: Attention
    write: CacheWrite | None = None
    hidden: Node | None = None
    layout: Layout | None = None
    log_sum_exp: Node | None = None
    scored: Inserted | None = None


@dataclass(frozen=True)
class Refusal:
    """Why something stays as it is: the reason in a sentence, and the node that it is about."""

    reason: str
    node: str
    site: int | None = None
