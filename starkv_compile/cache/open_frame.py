"""A frame that is cut by the end of a chunk, as `prefill_chunk_size` may cut it: it is one frame.

A part of a frame does not show the frame's shape. So each chunk is described together with the
chunks before it, back to the last one that ended in text.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..vision.describe import Seen


@dataclass(frozen=True)
class DescribedChunk:
    """Chunks in a row that end in a frame which may go on. end: tokens of the stream so far."""

    seen: Seen
    end: int

    def before(self, coming: Seen, start: int) -> Seen | None:
        """Returns these chunks if a frame goes on in the coming one, which begins at `start`."""
        ours, theirs = self.seen.is_image, coming.is_image
        if start != self.end or ours is None or theirs is None or len(ours) != len(theirs):
            return None
        goes_on = bool((ours[:, -1] & theirs[:, 0]).any())
        return self.seen if goes_on else None


def open_chunk(seen: Seen, grid: str, end: int) -> DescribedChunk | None:
    """Returns what to keep of chunks up to `end`, described by `grid`; None if no frame is open.

    Grids and sizes fit whole frames only.
    """
    if grid == "grid" or seen.is_image is None or not bool(seen.is_image[:, -1].any()):
        return None
    return DescribedChunk(seen, end)
