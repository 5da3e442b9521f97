"""What each token of a session is: text, or a place on a frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..kernels.reference.layout import newest_places

TEXT = -1
GRIDS = ("grid", "positions", "square", "text")
"""Where rows and columns may come from."""

_BY_TOKEN = ("frame", "row", "column", "counted")


@dataclass
class VisionLayout:
    """Frame, row and column of every token seen so far, and the tokens of the newest frame.

    Attributes:
        frame: [B, seen] int64, the number of the token's frame in time order; -1 for text.
        row: [B, seen] int64, the token's row on its frame.
        column: [B, seen] int64, the token's column on its frame.
        current: [B, N] int64, offsets within the last chunk of its newest frame's tokens, -1 beyond
            the row's last. N is the size of the largest frame so far.
        counted: [B, seen] bool, False for padding and for what has left the session.
        grid: where rows and columns come from: "grid" (the processor's), "positions" (M-RoPE),
            "square" (guessed), "text" (no frame yet).
    """

    frame: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    current: torch.Tensor
    counted: torch.Tensor
    grid: str = "text"

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> VisionLayout:
        nothing = torch.full((batch, 0), TEXT, device=device)
        current = torch.full((batch, 1), TEXT, device=device)
        return cls(nothing, nothing, nothing, current, nothing.bool())

    @property
    def seen(self) -> int:
        return self.frame.shape[1]

    @property
    def counts(self) -> torch.Tensor:
        """[B, 2] int64: how many tokens of text and of frames a budget counts."""
        kinds = ((self.frame < 0) & self.counted, (self.frame >= 0) & self.counted)
        return torch.stack([kind.sum(1) for kind in kinds], dim=1)

    def truncate(self, seen: int) -> None:
        """Forgets the tokens from `seen` on."""
        for name in _BY_TOKEN:
            setattr(self, name, getattr(self, name)[:, :seen])

    def pad_text(self, seen: int) -> None:
        """Appends the tokens up to `seen` that no chunk described (replies), as text."""
        missing = seen - self.seen
        if missing > 0:
            text = torch.full((len(self.frame), missing), TEXT, device=self.frame.device)
            self._append(text, text, text, text < 0)

    def extend(
        self,
        frame: torch.Tensor,
        row: torch.Tensor,
        column: torch.Tensor,
        grid: str,
        real: torch.Tensor | None = None,
    ) -> None:
        """Appends a chunk.

        Args:
            frame: [B, S], its frames counted from 0; -1 for text and for padding.
            row: [B, S].
            column: [B, S].
            grid: where rows and columns come from.
            real: [B, S] bool, False at padding. None: no padding.
        """
        visual = frame >= 0
        places = newest_places(frame, visual)
        # It never gets narrower: averaged patterns have this width, and a turn without a frame must
        # not cut them.
        widest = max(self.current.shape[1], int((places >= 0).sum(1).max()))
        self.current = F.pad(places, (0, max(0, widest - places.shape[1])), value=-1)[:, :widest]
        known = self.frame.amax(1, keepdim=True) + 1 if self.seen else 0
        frame = torch.where(visual, frame + known, TEXT)
        self._append(frame, row, column, torch.ones_like(visual) if real is None else real)
        if bool(visual.any()):
            self.grid = grid

    def _append(self, *chunk: torch.Tensor) -> None:
        for name, new in zip(_BY_TOKEN, chunk, strict=True):
            setattr(self, name, torch.cat([getattr(self, name), new], dim=1))

    def select(self, rows: torch.Tensor) -> None:
        """Keeps, repeats or reorders batch rows."""
        for name in (*_BY_TOKEN, "current"):
            setattr(self, name, getattr(self, name)[rows])
