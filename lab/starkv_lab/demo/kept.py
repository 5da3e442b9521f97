"""Reads from a compacted cache which cells of each screenshot it still holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..agent.world import Cell

if TYPE_CHECKING:
    from starkv_compile import StarKVCache


@dataclass(frozen=True)
class LayerKept:
    """Says what one layer kept at its last compaction.

    frames: the kept cells of each frame, in time order. text: number of kept text tokens. seen:
    number of tokens that the session had at that compaction.
    """

    frames: tuple[frozenset[Cell], ...]
    text: int
    seen: int

    @property
    def tokens(self) -> int:
        return self.text + sum(map(len, self.frames))


def kept_by_layer(cache: StarKVCache) -> list[LayerKept]:
    """Returns what each compressed layer keeps, for a session with one row.

    Raises:
        ValueError: nothing was compacted, the cache knows no layout, or each head of a layer
            keeps a set of its own.
    """
    layout = cache.shared.layout
    if layout is None:
        raise ValueError("the cache knows no layout; give a cache after a compaction")
    frame, row, column = (t[0].tolist() for t in (layout.frame, layout.row, layout.column))
    layers = []
    for layer in cache.compressed_layers:
        if layer.kept is None:
            raise ValueError(
                "a layer of the cache was never compacted; give a cache after a compaction"
            )
        if layer.kept.dim() == 3:
            raise ValueError(
                "each head keeps a set of its own: read `kept` [B, G, C] of each layer instead"
            )
        cells: list[set[Cell]] = [set() for _ in range(max(frame) + 1)]
        text = 0
        for place in layer.kept[0].tolist():
            if frame[place] < 0:
                text += 1
            else:
                cells[frame[place]].add((row[place], column[place]))
        layers.append(LayerKept(tuple(map(frozenset, cells)), text, layout.seen))
    return layers


def frame_grids(cache: StarKVCache) -> list[Cell]:
    """Returns (rows, columns) of each frame in time order, for a session with one row."""
    layout = cache.shared.layout
    if layout is None:
        raise ValueError("the cache knows no layout; give a cache after a compaction")
    grids = []
    for number in range(int(layout.frame.max()) + 1):
        here = layout.frame[0] == number
        grids.append((int(layout.row[0][here].max()) + 1, int(layout.column[0][here].max()) + 1))
    return grids
