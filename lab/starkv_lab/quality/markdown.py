"""Writes measured cells as tables for the documentation."""

from __future__ import annotations

from collections.abc import Iterator

from ..statistics import Interval
from .tables import Comparison, points
from .variants import FULL, VARIANTS, group_of, title_of

SHOWN = (
    "all",
    "reply",
    "again, current frame",
    "again, older frame",
    "again, both frames",
    "other, current frame",
    "other, older frame",
    "other, both frames",
    "all, 1 frame",
    "all, 5 frames",
)
ABLATED_AT = (0.2, 0.1, 0.05)


def markdown(comparison: Comparison, trajectories: Comparison | None = None) -> str:
    """Makes a table of the policies for each budget, and a table of the changes to each method."""
    parts = [
        "# Quality: tables",
        "`starkv bench plot` makes these tables. [Quality](quality.md) explains them. Shares are "
        "percent of right answers, with 95 % intervals (bootstrap over prompts). Differences are "
        "percentage points, and compare answers to the same questions.",
        *_policies(comparison, SHOWN, "{budget:.0%} of the tokens"),
        *_changes(comparison, "own", "default", "our default"),
        *_changes(comparison, "ablation", "paper", "the paper's configuration"),
    ]
    if trajectories is not None:
        steps = next(iter(trajectories.cells.values())).right.shape[1]
        title = f"Trajectories of {steps} steps, {{budget:.0%}} of the session's tokens"
        parts += _policies(trajectories, tuple(trajectories.parts), title)
    return "\n\n".join(parts) + "\n"


def _policies(comparison: Comparison, parts: tuple[str, ...], title: str) -> Iterator[str]:
    cells = [c for c in comparison.cells.values() if group_of(c.variant) == "policy"]
    full = comparison.cells.get((FULL.name, 1.0))
    shown = [part for part in parts if part in comparison.parts]
    for budget in sorted({c.budget for c in cells}, reverse=True):
        here = sorted(
            (c for c in cells if c.budget == budget),
            key=lambda c: -comparison.accuracy(c).value,
        )
        yield "## " + title.format(budget=budget)
        rows = [
            [
                title_of(c.variant),
                *(share(comparison.accuracy(c, part)) for part in shown),
                "" if full is None or c is full else points(comparison.difference(c, full)),
                f"{comparison.agreement(c):.0%}",
                f"{c.nbytes / c.full_nbytes:.1%}",
            ]
            for c in here
        ]
        yield table(["", *shown, "all, minus full cache", "same as full cache", "bytes kept"], rows)


def _changes(comparison: Comparison, group: str, base: str, title: str) -> Iterator[str]:
    cells = comparison.cells
    names = [name for name, variant in VARIANTS.items() if variant.group == group]
    budgets = [b for b in ABLATED_AT if (base, b) in cells]
    rows = []
    for name in names:
        if not any((name, b) in cells for b in budgets):
            continue
        row = [title_of(name)]
        for budget in budgets:
            cell, unchanged = cells.get((name, budget)), cells[base, budget]
            for part in ("again", "other"):
                gain = None if cell is None else comparison.difference(cell, unchanged, part)
                row.append("" if gain is None else _marked(gain))
        rows.append(row)
    if rows:
        yield f"## One change to {title}"
        yield "Each number is the gain in points. The interval of a bold number does not contain 0."
        yield table(["", *(f"{b:.0%} {p}" for b in budgets for p in ("again", "other"))], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def share(interval: Interval) -> str:
    """A share and its interval in percent."""
    value, low, high = (100 * number for number in interval)
    return f"{value:.1f} ({low:.0f}-{high:.0f})"


def _marked(interval: Interval) -> str:
    return f"**{points(interval)}**" if interval.excludes_zero else points(interval)
