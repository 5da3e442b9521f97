"""What a policy reads and returns. Values are tensors, or their proxies in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from ..kernels.ops import STARKV
from ..kernels.reference.attention import pool


@dataclass(frozen=True)
class ScoreInputs:
    """One layer's values at a cache write.

    B is the batch, H the query heads, G the KV heads, S the new tokens, L all tokens (stored and
    new), P the tokens before the window, D the head size, E the hidden size. If each head keeps a
    set of its own, frame, row, column, index and novelty are [B, G / sharing, L].

    Attributes:
        query: [B, H, S, D], after rotary positions.
        key: [B, G, L, D], after rotary positions.
        value: [B, G, L, D].
        mask: [B or 1, 1 or H, rows, L], bool or additive; None: causal attention. It has a row for
            each new query, or only for the last ones (the window's, or `Policy.observers`).
        scale: factor of the products of queries and keys.
        log_sum_exp: [B, H, S] of the logits, if the graph has it; else None.
        hidden: [B, S, E], the input of the key projection; None if the pass did not find it.
        real: [B, L] bool, False at padding; None without padding.
        layout: frame, row, column [B, L] and current [B, N], as in `reference.star.Layout`. frame
            is -1 for text.
        counts: [B, 2] int64, tokens of text and of frames that a budget counts; None if unknown.
        state: the layer's scoring state, as in `reference.star.State`.
        index: [B, L] int64, each token's place in the session's stream; None if unknown.
        turn_start: [1] int64, place in the stream of the first token of the turn at hand, which may
            come in several chunks; None: every token is of it.
        novelty: [B, L] float32, what the policy returned for stored tokens at an earlier prompt;
            None if unknown.
        layer: number of the layer.
        window: W, before it is clipped to the capacity.
        capacity: C, how many tokens stay, the window included.
        sharing: how many heads of the key are stored as one. Scores and state have G / sharing
            heads.
        new: S, if `query` has only the last of the new queries. None: it has all.
    """

    query: Any
    key: Any
    value: Any
    mask: Any
    scale: float
    log_sum_exp: Any
    hidden: Any
    real: Any
    layout: tuple[Any, Any, Any, Any]
    counts: Any
    state: tuple[Any, Any, Any, Any]
    index: Any
    novelty: Any
    layer: int
    window: int
    capacity: Any
    sharing: int = 1
    new: Any = None
    turn_start: Any = None

    @property
    def stored(self) -> Any:
        """How many of the L tokens were stored before this prompt."""
        return self.key.shape[2] - (self.query.shape[2] if self.new is None else self.new)

    @property
    def of_turn(self) -> Any:
        """Which tokens came in the turn at hand: bool, of the shape of `index`. None: all."""
        if self.index is None or self.turn_start is None:
            return None
        return self.index >= self.turn_start

    def window_attention(self) -> Any:
        """Returns [B, G / sharing, P]: attention that the last W queries pay to each token.

        It is summed over these queries, and averaged over the query heads of each stored head.
        `kernels.reference.attention` has the formula.
        """
        attention = STARKV.window_attention(
            self.query,
            self.key,
            self.mask,
            self.scale,
            self.window,
            self.capacity,
            False,
            self.log_sum_exp,
        )
        return self.stored_heads(attention)

    def pooled_attention(self, width: int) -> Any:
        """Returns [B, G / sharing, P]: the same, averaged over `width` neighbours, as in SnapKV."""
        return pool(self.window_attention(), width)

    def spatial_novelty(self) -> Any:
        """Returns [B, L]: 1 - mean cosine of a token's keys with its neighbours' on the screen.

        Text has 1. The layer must keep one set for all heads. `kernels.reference.novelty` has the
        details.
        """
        frame, row, column, _ = self.layout
        told = torch.ones_like(frame, dtype=torch.float32) if self.novelty is None else self.novelty
        earlier = told[:, : self.stored]
        return STARKV.spatial_novelty(self.key, frame, row, column, earlier)

    def temporal_novelty(self) -> Any:
        """Returns [B, L]: how unlike a token of an older screen is the one now at its place.

        0 to 1; text and the newest screen have 1. The layer must keep one set for all heads.
        `kernels.reference.novelty` has the details.
        """
        return STARKV.temporal_novelty(self.key, *self.layout, self.stored)

    def key_novelty(self, among: Any = None) -> Any:
        """Returns [B, L]: 1 - mean cosine of a token's keys with those of the tokens `among`.

        Args:
            among: [B, L] bool. None: all tokens. Padding is left out. Other tokens have 0.
        """
        if among is None:
            among = torch.ones_like(self.key[:, 0, :, 0], dtype=torch.bool)
        return STARKV.key_novelty(self.key, among if self.real is None else among & self.real)

    def stored_heads(self, scores: Any) -> Any:
        """Averages scores [B, G, ...] of the key's heads over heads that are stored as one."""
        return scores if self.sharing == 1 else scores.unflatten(1, (-1, self.sharing)).mean(2)

    def places(self) -> Any:
        """Returns [B, L]: 1, 2, 3 ... for the tokens, and 0 for the padding before them."""
        if self.real is not None:
            return self.real.cumsum(-1)
        return torch.ones_like(self.key[:, 0, :, 0], dtype=torch.int64).cumsum(-1)

    def unit_keys(self) -> Any:
        """Returns [B, L, G * D] float32: the keys of all heads, concatenated and of length 1.

        Padding and keys that are not finite are zeros, so they resemble no key.
        """
        keys = self.key.float().transpose(1, 2).flatten(2)
        good = keys.isfinite().all(-1, keepdim=True)
        if self.real is not None:
            good = good & self.real[..., None]
        return F.normalize(keys.masked_fill(~good, 0.0), dim=-1)


class Scored(NamedTuple):
    """What `Policy.score` returns.

    Attributes:
        scores: float32 [B, P], or [B, G, P] with `per_head`, or the same for all L tokens.
        state: the layer's new state, or `inputs.state` as it came.
        novelty: [B, L] float32. At the next prompt, `inputs.novelty` has these values for the
            tokens that were kept. None: the values of `inputs` stay.
    """

    scores: Any
    state: tuple[Any, Any, Any, Any]
    novelty: Any = None
