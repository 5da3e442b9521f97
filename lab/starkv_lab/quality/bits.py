"""Shows answers against bytes for kept tokens in the model's precision, 8 and 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .band import draw_band
from .cells import Cell
from .markdown import share, table
from .tables import Comparison, points
from .variants import FULL, VARIANTS, title_of

COLORS = ("tab:green", "tab:blue", "tab:orange", "tab:gray")
STYLES = {16: "-", 8: "--", 4: ":"}


def lines(comparison: Comparison) -> dict[tuple[str, int], list[Cell]]:
    """The cells of each policy and number of bits, for policies that were measured in few bits."""
    found: dict[tuple[str, int], list[Cell]] = {}
    for name, variant in VARIANTS.items():
        line = [cell for cell in comparison.cells.values() if cell.variant == name]
        if line and variant is not FULL:
            key = variant.of or name, variant.nbits
            found[key] = sorted(line, key=lambda cell: cell.nbytes)
    few = {policy for policy, nbits in found if nbits != 16}
    return {key: line for key, line in found.items() if key[0] in few}


def _named(nbits: int) -> str:
    return "not rounded" if nbits == 16 else f"{nbits} bits"


def bits_table(comparison: Comparison) -> str:
    """A line in Markdown for each policy, number of bits and budget, from few bytes to many."""
    full = comparison.cells.get((FULL.name, 1.0))
    cells = [
        (cell.nbytes / cell.full_nbytes, cell, policy, nbits)
        for (policy, nbits), line in lines(comparison).items()
        for cell in line
    ]
    rows = [
        [
            f"{100 * part:.1f}",
            f"{100 * cell.budget:.0f}",
            _named(nbits),
            title_of(policy),
            share(comparison.accuracy(cell)),
            "" if full is None else points(comparison.difference(cell, full)),
        ]
        for part, cell, policy, nbits in sorted(cells, key=lambda entry: entry[0])
    ]
    head = ["bytes, %", "tokens, %", "stored", "policy", "right answers, %", "less than all tokens"]
    return table(head, rows) + "\n"


def draw_bits(comparison: Comparison, path: Path) -> None:
    """Draws a line with its 95 % band for each policy and number of bits."""
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(9, 7.5), layout="constrained")
    by_bits = lines(comparison)
    policies = list(dict.fromkeys(policy for policy, _ in by_bits))
    full: Any = comparison.cells.get((FULL.name, 1.0))
    if full is not None:
        right = 100 * comparison.accuracy(full).value
        panel.axhline(right, color="black", linewidth=0.8, label="full cache")
    for (policy, nbits), line in by_bits.items():
        color = COLORS[policies.index(policy) % len(COLORS)]
        label = f"{title_of(policy)}, {_named(nbits)}"
        draw_band(panel, comparison, line, "all", color=color, linestyle=STYLES[nbits], label=label)
    panel.set_xscale("log")
    panel.set_xticks([0.03, 0.05, 0.1, 0.2, 0.4], ["3", "5", "10", "20", "40"])
    panel.minorticks_off()
    panel.set_xlabel("bytes kept, % of the full cache")
    panel.set_ylabel("right answers in %, with 95 % bands")
    panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
