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
    beyond the row's last; N is the largest frame so far. grid says where rows and columns come
    from: "grid" (the processor's), "positions" (M-RoPE), "square" (guessed), "text" (no frame
    yet).
    """

    frame: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    current: torch.Tensor
    grid: str = "text"

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> VisionLayout:
        nothing = torch.full((batch, 0), TEXT, device=device)
        return cls(nothing, nothing, nothing, torch.full((batch, 1), TEXT, device=device))

    @property
    def seen(self) -> int:
        return self.frame.shape[1]

    def truncate(self, seen: int) -> None:
        """Forget tokens from `seen` on."""
        self.frame, self.row, self.column = (
            t[:, :seen] for t in (self.frame, self.row, self.column)
        )

    def pad_text(self, seen: int) -> None:
        """Count the tokens up to `seen` that no chunk described (answers) as text."""
        missing = seen - self.seen
        if missing > 0:
            text = torch.full((len(self.frame), missing), TEXT, device=self.frame.device)
            self._append(text, text, text)

    def extend(
        self, frame: torch.Tensor, row: torch.Tensor, column: torch.Tensor, grid: str
    ) -> None:
        """Append a chunk: [B, S] each, its frames counted from 0, -1 for text."""
        visual = frame >= 0
        places = newest_places(frame, visual)
        # Never narrower than before: averaged patterns are as wide, and a turn without a frame
        # must not cut them.
        widest = max(self.current.shape[1], int((places >= 0).sum(1).max()))
        self.current = F.pad(places, (0, max(0, widest - places.shape[1])), value=-1)[:, :widest]
        known = self.frame.amax(1, keepdim=True) + 1 if self.seen else 0
        self._append(torch.where(visual, frame + known, TEXT), row, column)
        if bool(visual.any()):
            self.grid = grid

    def _append(self, frame: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> None:
        self.frame = torch.cat([self.frame, frame], dim=1)
        self.row = torch.cat([self.row, row], dim=1)
        self.column = torch.cat([self.column, column], dim=1)

    def select(self, rows: torch.Tensor) -> None:
        """Keep, repeat or reorder batch rows."""
        for name in ("frame", "row", "column", "current"):
            setattr(self, name, getattr(self, name)[rows])
