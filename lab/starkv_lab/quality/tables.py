"""Makes rows of measured cells, with intervals for every part of the questions."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ..statistics import Bootstrap, Interval, wilson
from .cells import Cell, CellFile
from .design import AnyDesign
from .variants import FULL, title_of


@dataclass(frozen=True)
class Row:
    """Holds one part of the questions in one cell, with 95 % intervals.

    accuracy: share of right answers, with the interval of a bootstrap over prompts. wilson: the
    interval if all questions were independent. minus_full, minus_default:
    paired differences, or None where the other cell was not measured. agreement: share of answers
    that agree with the full cache in every token.
    """

    cell: Cell
    part: str
    questions: int
    accuracy: Interval
    wilson: tuple[float, float]
    minus_full: Interval | None
    minus_default: Interval | None
    agreement: float

    def to_csv(self) -> dict[str, object]:
        cell, nothing = self.cell, ("", "", "")
        values: dict[str, object] = {
            "variant": cell.variant,
            "budget": cell.budget,
            "part": self.part,
            "questions": self.questions,
        }
        for name, interval in (
            ("accuracy", self.accuracy),
            ("minus_full", self.minus_full or nothing),
            ("minus_default", self.minus_default or nothing),
        ):
            values |= zip((name, f"{name}_low", f"{name}_high"), interval, strict=True)
        values |= zip(("wilson_low", "wilson_high"), self.wilson, strict=True)
        values |= {
            "agreement": self.agreement,
            "byte_share": cell.nbytes / cell.full_nbytes,
            "recall": cell.recall,
            **{f"kl_{way}": kl for way, kl in cell.kl.items()},
            "seconds": cell.seconds,
        }
        return {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()}


class Comparison:
    """Compares cells of one design. All use the same resamples."""

    def __init__(self, design: AnyDesign, cells: Sequence[Cell]) -> None:
        self.parts = design.slices()
        self.cells = {cell.key: cell for cell in cells}
        self._bootstrap = Bootstrap(design.prompts)

    def accuracy(self, cell: Cell, part: str = "all") -> Interval:
        return self._bootstrap.mean(cell.right, self.parts[part])

    def difference(self, cell: Cell, other: Cell, part: str = "all") -> Interval:
        """Returns how much larger the share of right answers of `cell` is than that of `other`."""
        return self._bootstrap.mean(cell.right.astype(float) - other.right, self.parts[part])

    def agreement(self, cell: Cell, part: str = "all") -> float:
        """Returns the share of answers that agree with the full cache in every token."""
        weights = self.parts[part]
        return float((cell.same * weights).sum() / weights.sum())

    def rows(self) -> Iterator[Row]:
        """Yields a row for every part of every cell."""
        for cell in self.cells.values():
            full, default = (
                self.cells.get(key) for key in ((FULL.name, 1.0), ("default", cell.budget))
            )
            for part, weights in self.parts.items():
                counted = weights > 0
                effective = float(weights.sum() ** 2 / (weights**2).sum())
                right = effective * float((cell.right * weights).sum() / weights.sum())
                yield Row(
                    cell,
                    part,
                    int(counted.sum()),
                    self.accuracy(cell, part),
                    wilson(right, effective),
                    None if full is None else self.difference(cell, full, part),
                    None if default is None else self.difference(cell, default, part),
                    self.agreement(cell, part),
                )


def write_csv(file: CellFile, path: Path) -> None:
    """Writes a row for every part of every cell of the file."""
    rows = [row.to_csv() for row in Comparison(file.design, list(file.cells.values())).rows()]
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def accuracy_table(design: AnyDesign, cells: Sequence[Cell]) -> Table:
    """Makes a line for each cell with its right answers, best first at each budget."""
    comparison = Comparison(design, cells)
    table = Table(title=f"Right answers to {design.questions} questions per line (95 % intervals)")
    shown = [part for part in design.shown if part in comparison.parts]
    for name in ("budget", "policy", *shown, "minus full cache", "same as full cache"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    full = comparison.cells.get((FULL.name, 1.0))

    def rank(cell: Cell) -> tuple[float, float]:
        return -cell.budget, -comparison.accuracy(cell).value

    for cell in sorted(cells, key=rank):
        shares = [_percent(comparison.accuracy(cell, part)) for part in shown]
        less = "" if full is None or cell is full else points(comparison.difference(cell, full))
        same = f"{comparison.agreement(cell):.1%}"
        table.add_row(f"{cell.budget:.0%}", title_of(cell.variant), *shares, less, same)
    return table


def _percent(interval: Interval) -> str:
    return f"{interval.value:.1%} ({100 * interval.low:.0f}-{100 * interval.high:.0f})"


def points(interval: Interval) -> str:
    """Writes a difference of shares and its interval in percentage points."""
    value, low, high = (100 * number for number in interval)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
