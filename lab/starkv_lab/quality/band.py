"""Draws right answers against bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .cells import Cell
from .tables import Comparison


def draw_band(
    panel: Any, comparison: Comparison, line: Sequence[Cell], part: str, *, color: Any, **style: Any
) -> None:
    """Draws a line through the cells, with its 95 % band. style: of the line, as in matplotlib."""
    shares = [cell.nbytes / cell.full_nbytes for cell in line]
    low, middle, high = (
        [100 * getattr(comparison.accuracy(cell, part), end) for cell in line]
        for end in ("low", "value", "high")
    )
    panel.plot(shares, middle, color=color, marker="o", markersize=3, **style)
    panel.fill_between(shares, low, high, color=color, alpha=0.12, linewidth=0)
