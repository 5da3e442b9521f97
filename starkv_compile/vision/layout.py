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
        earlier: [B, M] int64, places in the stream of the newest frame's tokens that came before
            the last chunk, -1 beyond the row's last. None: the last chunk cut no frame.
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
    earlier: torch.Tensor | None = None

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
        self.current = self.current.where(self.current < seen, TEXT)

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
        again: int = 0,
    ) -> None:
        """Appends a chunk.

        Args:
            frame: [B, S], its frames counted from 0; -1 for text and for padding.
            row: [B, S].
            column: [B, S].
            grid: where rows and columns come from.
            real: [B, S] bool, False at padding. None: no padding.
            again: how many of the first tokens came in earlier chunks. Described with what followed
                them, they replace what was said of them.
        """
        start = self.seen - again
        counted, known = self.counted[:, start:], torch.ones_like(frame, dtype=torch.bool)
        self.truncate(start)
        visual = frame >= 0
        places = newest_places(frame, visual)
        # It never gets narrower: averaged patterns have this width, and a turn without a frame must
        # not cut them.
        widest = max(self.current.shape[1], int((places >= 0).sum(1).max()))
        before = places.where(places < again, TEXT)[:, :again]
        self.earlier = (
            before.where(before < 0, before + start) if bool((before >= 0).any()) else None
        )
        places = _packed((places - again).clamp(min=TEXT))
        self.current = F.pad(places, (0, max(0, widest - places.shape[1])), value=-1)[:, :widest]
        frames = self.frame.amax(1, keepdim=True) + 1 if self.seen else 0
        frame = torch.where(visual, frame + frames, TEXT)
        known = known if real is None else real.clone()
        known[:, :again] = counted
        self._append(frame, row, column, known)
        if bool(visual.any()):
            self.grid = grid

    def _append(self, *chunk: torch.Tensor) -> None:
        for name, new in zip(_BY_TOKEN, chunk, strict=True):
            setattr(self, name, torch.cat([getattr(self, name), new], dim=1))

    def select(self, rows: torch.Tensor) -> None:
        """Keeps, repeats or reorders batch rows."""
        for name in (*_BY_TOKEN, "current"):
            setattr(self, name, getattr(self, name)[rows])
        if self.earlier is not None:
            self.earlier = self.earlier[rows]


def _packed(places: torch.Tensor) -> torch.Tensor:
    """[B, N]: each row's places in order, then its -1."""
    order = (places < 0).long().sort(dim=1, stable=True).indices
    return places.gather(1, order)


def stored_slots(index: torch.Tensor, earlier: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    """[B, N]: slots of the newest frame's tokens, those of earlier chunks first, then -1.

    What was dropped of the earlier ones is left out, and what heads store in different slots.

    Args:
        index: [B, (G,) L] int64, place in the stream of each token in slot order; it ascends.
        earlier: [B, M] as in `VisionLayout`.
        current: [B, N], slots of the last chunk's tokens of that frame.
    """
    index = index.reshape(len(index), -1, index.shape[-1]).contiguous()
    wanted = earlier[:, None].expand(-1, index.shape[1], -1).contiguous()
    slot = torch.searchsorted(index, wanted).clamp(max=index.shape[-1] - 1)
    there = ((index.gather(-1, slot) == wanted) & (slot == slot[:, :1])).all(1)
    slots = torch.cat([slot[:, 0].where(there & (earlier >= 0), -1), current], dim=1)
    return _packed(slots)[:, : current.shape[1]]
