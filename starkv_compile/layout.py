"""What each token of a session is: text, or a place on a frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .kernels.reference.layout import newest_places

TEXT = -1


@dataclass
class VisionLayout:
    """frame, row, column of every token seen so far, and where the newest frame is.

    frame, row, column: [B, seen] int64; frame is -1 for text, else it counts frames in time
    order. current: [B, N] int64, offsets within the last chunk of its newest frame's tokens, -1
    beyond the row's last; N is the largest frame so far. counts: [B, 2] int64, how many tokens of
    text and of frames a budget counts: no padding, nor what has left the session. grid says where
    rows and columns come from: "grid" (the processor's), "positions" (M-RoPE), "square" (guessed),
    "text" (no frame yet).
    """

    frame: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    current: torch.Tensor
    counts: torch.Tensor
    grid: str = "text"

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> VisionLayout:
        nothing = torch.full((batch, 0), TEXT, device=device)
        current = torch.full((batch, 1), TEXT, device=device)
        counts = torch.zeros(batch, 2, dtype=torch.int64, device=device)
        return cls(nothing, nothing, nothing, current, counts)

    @property
    def seen(self) -> int:
        return self.frame.shape[1]

    def truncate(self, seen: int) -> None:
        """Forget tokens from `seen` on."""
        self.counts = self.counts - _counts(self.frame[:, seen:])
        self.frame, self.row, self.column = (
            t[:, :seen] for t in (self.frame, self.row, self.column)
        )

    def pad_text(self, seen: int) -> None:
        """Count the tokens up to `seen` that no chunk described (answers) as text."""
        missing = seen - self.seen
        if missing > 0:
            text = torch.full((len(self.frame), missing), TEXT, device=self.frame.device)
            self._append(text, text, text)
            self.counts = self.counts + _counts(text)

    def extend(
        self,
        frame: torch.Tensor,
        row: torch.Tensor,
        column: torch.Tensor,
        grid: str,
        padding: torch.Tensor | None = None,
    ) -> None:
        """Append a chunk: [B, S] each, its frames counted from 0, -1 for text and for padding."""
        visual = frame >= 0
        places = newest_places(frame, visual)
        # Never narrower than before: averaged patterns are as wide, and a turn without a frame
        # must not cut them.
        widest = max(self.current.shape[1], int((places >= 0).sum(1).max()))
        self.current = F.pad(places, (0, max(0, widest - places.shape[1])), value=-1)[:, :widest]
        known = self.frame.amax(1, keepdim=True) + 1 if self.seen else 0
        self._append(torch.where(visual, frame + known, TEXT), row, column)
        self.counts = self.counts + _counts(frame, padding)
        if bool(visual.any()):
            self.grid = grid

    def _append(self, frame: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> None:
        self.frame = torch.cat([self.frame, frame], dim=1)
        self.row = torch.cat([self.row, row], dim=1)
        self.column = torch.cat([self.column, column], dim=1)

    def select(self, rows: torch.Tensor) -> None:
        """Keep, repeat or reorder batch rows."""
        for name in ("frame", "row", "column", "current", "counts"):
            setattr(self, name, getattr(self, name)[rows])


def _counts(frame: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
    """[B, 2]: tokens of text and of frames among those of [B, S]."""
    text = frame < 0 if padding is None else (frame < 0) & ~padding
    return torch.stack([text.sum(1), (frame >= 0).sum(1)], dim=1)
