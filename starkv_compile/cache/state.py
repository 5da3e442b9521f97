"""The state of a cache that no single layer owns."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..vision.layout import VisionLayout
from .open_frame import DescribedChunk


class SharedState:
    """What all layers of a cache share.

    Attributes:
        layout: the layout of every token seen; None if it is unknown.
        appending: whether the coming tokens are stored as they are, because they may be rolled
            back (drafts to be verified).
        is_read: whether the model reads stored keys itself. Then all tokens are stored as they are.
        compacts: whether a layer has stored tokens of the call in progress that may be shortened.
        stepping: whether a token is being decoded into the layers' buffers.
        chunk: what the last chunk was described by, if a frame may go on after it.
        turn_start: [1] int64, how many tokens came before the turn at hand. A turn is one prompt,
            in one chunk or in several. None: no chunk has come.
        turn_ended: whether the next chunk begins a turn.
        slot: [1] int64, the place of that token in the buffers.
        mask_fits: whether the masks of the call have as many columns as the cache has tokens: the
            model asked the cache for that number, or the caller passed a mask for each head.
        padding: [B] int64, how many tokens each row's mask hid in the last prompt; None: unknown.
        uneven: whether no mask of the call in progress fits all layers.
        stopped_at: how many tokens each layer has seen, if a call stopped between layers.
    """

    def __init__(self) -> None:
        self.layout: VisionLayout | None = None
        self.chunk: DescribedChunk | None = None
        self.turn_start: torch.Tensor | None = None
        self.turn_ended = True
        self.appending = False
        self.is_read = False
        self.compacts = False
        self.stepping = False
        self.slot: torch.Tensor | None = None
        self.mask_fits = True
        self.padding: torch.Tensor | None = None
        self.uneven = False
        self.stopped_at: dict[int, int] | None = None

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keeps, repeats or reorders batch rows of what is known about the tokens."""
        self.chunk = None
        if self.layout is not None:
            self.layout.select(rows.to(self.layout.frame.device))
        if self.padding is not None:
            self.padding = self.padding[rows.to(self.padding.device)]

    def fork(self) -> SharedState:
        twin = SharedState()
        twin.layout = None if self.layout is None else replace(self.layout)
        twin.chunk, twin.stopped_at = self.chunk, self.stopped_at
        twin.turn_start, twin.turn_ended = self.turn_start, self.turn_ended
        twin.padding, twin.uneven = self.padding, self.uneven
        twin.is_read, twin.mask_fits = self.is_read, self.mask_fits
        return twin
