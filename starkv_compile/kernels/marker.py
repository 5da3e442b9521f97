"""Names for the arguments and results of the op `starkv.cache_write`.

The op marks where a cache stores a prompt. Its own signature is flat, as that of every registered
op. These tuples have the same fields in the same order. A cache fills them with tensors, a graph
pass fills them with nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .reference.star import Layout, State


class Written(NamedTuple):
    """What one layer stores of a prompt: the marker's results. Each has its argument's name.

    key, value: [B, G, L, D]. place: [B, L] int64, where each token is in the stream of all tokens
    seen. novelty: [B, L] float32, see `reference.novelty.spatial_novelty`. Both are [B, G, L] if
    each head keeps a set of its own. The other four are the layer's scoring state, as in
    `reference.star.State`.
    """

    key: torch.Tensor
    value: torch.Tensor
    place: torch.Tensor
    novelty: torch.Tensor
    mi: torch.Tensor
    mi_steps: torch.Tensor
    pattern: torch.Tensor
    pattern_count: torch.Tensor

    @property
    def state(self) -> State:
        return State(self.mi, self.mi_steps, self.pattern, self.pattern_count)


class WriteArguments(NamedTuple):
    """The marker's arguments: what is about to be stored, and what policies read.

    key to novelty and mi to pattern_count: as in `Written`. frame to current: as in
    `reference.star.Layout`. counts: [B, 2] as in `vision.layout.VisionLayout`. turn_start: [1] as
    in `cache.state.SharedState`. seen: number of tokens that a budget counts if it is a share.
    has_layout: whether the cache knows what the tokens are. If not, frame to counts say that all
    tokens are text. mask_fits: whether masks of the attention have as many columns as the cache
    has tokens, also after a compaction.
    """

    key: torch.Tensor
    value: torch.Tensor
    place: torch.Tensor
    novelty: torch.Tensor
    frame: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    current: torch.Tensor
    counts: torch.Tensor
    mi: torch.Tensor
    mi_steps: torch.Tensor
    pattern: torch.Tensor
    pattern_count: torch.Tensor
    turn_start: torch.Tensor
    seen: int
    has_layout: bool
    mask_fits: bool

    @property
    def layout(self) -> Layout:
        return Layout(self.frame, self.row, self.column, self.current)

    @property
    def state(self) -> State:
        return State(self.mi, self.mi_steps, self.pattern, self.pattern_count)

    @property
    def unchanged(self) -> Written:
        """What a marker returns if no pass replaces it, without the copies."""
        return Written(
            key=self.key,
            value=self.value,
            place=self.place,
            novelty=self.novelty,
            **self.state._asdict(),
        )
