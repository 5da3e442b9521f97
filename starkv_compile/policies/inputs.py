"""What a policy reads and returns. Values are tensors, or proxies of them in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from ..kernels.ops import STARKV
from ..kernels.reference.attention import pool


@dataclass(frozen=True)
class ScoreInputs:
    """One layer's values at a cache write. Shapes as in `kernels`.

    query [B, H, S, D], key and value [B, G, L, D]; mask and log_sum_exp as in `window_attention`,
    the mask perhaps of the last queries alone, as many as the policy's window or `observers`;
    hidden [B, S, E] or None where the pass did not find it; real [B, L] bool, False at padding, or
    None; layout and state as in `reference.star`; counts [B, 2] as in `layout.VisionLayout`, or
    None where the graph does not say; index [B, L], place of each token in the session's stream,
    and novelty [B, L] float32, what an earlier prompt of the session said of the tokens it left, or
    None where the graph does not say; layer: its number; window W before clipping; capacity C.
    sharing: how many of the key's heads are stored as one: scores and state have G / sharing
    subspaces.

    Where a set for each head is kept, frame, row, column, index and novelty are
    [B, G / sharing, L].
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

    def window_attention(self) -> Any:
        """[B, G / sharing, P]: see `reference.attention.window_attention`."""
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
        """[B, G / sharing, P]: the same, averaged over `width` neighbours: SnapKV's scores."""
        return pool(self.window_attention(), width)

    def spatial_novelty(self) -> Any:
        """[B, L]: see `reference.novelty.spatial_novelty`; of one set for all heads."""
        frame, row, column, _ = self.layout
        told = torch.ones_like(frame, dtype=torch.float32) if self.novelty is None else self.novelty
        earlier = told[:, : self.key.shape[2] - self.query.shape[2]]
        return STARKV.spatial_novelty(self.key, frame, row, column, earlier)

    def temporal_novelty(self) -> Any:
        """[B, L]: see `reference.novelty.temporal_novelty`; of one set for all heads."""
        stored = self.key.shape[2] - self.query.shape[2]
        return STARKV.temporal_novelty(self.key, *self.layout, stored)

    def key_novelty(self, among: Any = None) -> Any:
        """[B, L]: see `reference.novelty.key_novelty`. among [B, L] bool, all by default; without
        padding."""
        if among is None:
            among = torch.ones_like(self.key[:, 0, :, 0], dtype=torch.bool)
        return STARKV.key_novelty(self.key, among if self.real is None else among & self.real)

    def stored_heads(self, scores: Any) -> Any:
        """Scores [B, G, ...] of the key's heads as those of the heads that are stored."""
        return scores if self.sharing == 1 else scores.unflatten(1, (-1, self.sharing)).mean(2)

    def places(self) -> Any:
        """[B, L]: 1, 2, 3 ... for the stored tokens that are no padding; before those, 0."""
        if self.real is not None:
            return self.real.cumsum(-1)
        return torch.ones_like(self.key[:, 0, :, 0], dtype=torch.int64).cumsum(-1)

    def unit_keys(self) -> Any:
        """[B, L, G * D] float32: the keys of all heads side by side, of length 1.

        Padding and a key that is not finite are zeros: they resemble nothing.
        """
        keys = self.key.float().transpose(1, 2).flatten(2)
        good = keys.isfinite().all(-1, keepdim=True)
        if self.real is not None:
            good = good & self.real[..., None]
        return F.normalize(keys.masked_fill(~good, 0.0), dim=-1)


class Scored(NamedTuple):
    """novelty: [B, L], to come back with the tokens that are kept at the next prompt; None: what
    came in."""

    scores: Any
    state: tuple[Any, Any, Any, Any]
    novelty: Any = None
