"""The state of a cache that no single layer owns."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..vision.layout import VisionLayout


class SharedState:
    """What all layers of a cache share.

    Attributes:
        layout: the layout of every token seen; None if it is unknown.
        appending: whether the coming tokens are stored as they are, because they may be rolled
            back (drafts to be verified).
        stepping: whether a token is being decoded into the layers' buffers.
        slot: [1] int64, the place of that token in the buffers.
        stopped_at: how many tokens each layer has seen, if a call stopped between layers.
    """

    def __init__(self) -> None:
        self.layout: VisionLayout | None = None
        self.appending = False
        self.stepping = False
        self.slot: torch.Tensor | None = None
        self.stopped_at: dict[int, int] | None = None

    def fork(self) -> SharedState:
        twin = SharedState()
        twin.layout = None if self.layout is None else replace(self.layout)
        return twin
