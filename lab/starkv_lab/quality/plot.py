"""Makes the documentation's tables and pictures of measured cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starkv_compile import MissingPackage
from starkv_compile.files import check_writable

from .band import draw_band
from .bits import bits_table, draw_bits
from .cells import Cell, read_cells
from .design import Design, Trajectories
from .markdown import ABLATED_AT, markdown
from .tables import Comparison
from .variants import FULL, VARIANTS, group_of, title_of

PANELS = {
    "all": "all questions",
    "again": "the question before compaction, asked again",
    "other": "questions asked only after compaction",
}
LOUD = {"oracle": "black", "default": "tab:green", "paper": "tab:red"}  # with thick lines
COLORS = (
    "tab:blue",
    "tab:orange",
    "tab:purple",
    "tab:brown",
    "tab:pink",
    "tab:gray",
    "tab:olive",
    "tab:cyan",
    "navy",
    "gold",
    "plum",
    "peru",
    "teal",
    "salmon",
    "silver",
    "yellowgreen",
    "skyblue",
    "indigo",
    "tan",
    "slategray",
    "orchid",
    "darkkhaki",
)


def draw_plots(folder: Path, out: Path) -> list[Path]:
    """Writes `quality-tables.md` and `quality.png`, and returns the paths of all files.

    Writes `quality-ablation.png` too if the folder has changes to the paper's method, and
    `quality-bits.md` and `quality-bits.png` if it has kept tokens in few bits.

    Args:
        folder: a folder with `cells.jsonl`. The tables include a `trajectories.jsonl` next to it.
        out: the folder for the files.

    Raises:
        StarKVError: the folder has no `cells.jsonl`, or matplotlib is missing.
    """
    head, cells = read_cells(folder / Design.file)
    try:
        import matplotlib
    except ImportError as error:
        raise MissingPackage(f"plots need matplotlib: pip install matplotlib ({error})") from error
    matplotlib.use("Agg")
    design = Design(**{**head["design"], "frames": tuple(head["design"]["frames"])})
    comparison = Comparison(design, cells)
    check_writable(out / "quality-tables.md", "--out")
    paths = [out / "quality-tables.md", out / "quality.png"]
    paths[0].write_text(markdown(comparison, _trajectories(folder / Trajectories.file)))
    _draw_policies(comparison, paths[1])
    if any(group_of(cell.variant) == "ablation" for cell in cells):
        paths.append(out / "quality-ablation.png")
        _draw_ablation(comparison, paths[-1])
    if any(group_of(cell.variant) == "bits" for cell in cells):
        paths += [out / "quality-bits.md", out / "quality-bits.png"]
        paths[-2].write_text(bits_table(comparison))
        draw_bits(comparison, paths[-1])
    return paths


def _trajectories(path: Path) -> Comparison | None:
    if not path.exists():
        return None
    head, cells = read_cells(path)
    return Comparison(Trajectories(**head["design"]), cells)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_policies(comparison: Comparison, path: Path) -> None:
    """Draws a panel for each way of asking, and a line with its 95 % band for each policy."""
    from matplotlib import pyplot

    cells = [c for c in comparison.cells.values() if group_of(c.variant) == "policy"]
    full = comparison.cells.get((FULL.name, 1.0))
    names = [name for name in dict.fromkeys(c.variant for c in cells) if name != FULL.name]
    quiet = [name for name in names if name not in LOUD]
    colors = dict(zip(quiet, COLORS * len(quiet), strict=False)) | LOUD
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(15, 6.5), sharey=True)
    for panel, (part, title) in zip(panels, PANELS.items(), strict=True):
        for name in names:
            line = sorted((c for c in cells if c.variant == name), key=lambda c: c.nbytes)
            if full is not None:
                line.append(full)
            _draw_line(panel, comparison, line, part, name, colors[name])
        panel.set_xscale("log")
        panel.set_xticks([0.03, 0.05, 0.1, 0.2, 0.4, 1], ["3", "5", "10", "20", "40", "100"])
        panel.minorticks_off()
        panel.set_xlabel("bytes kept, % of the full cache")
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("right answers in %, with 95 % bands")
    handles, labels = panels[0].get_legend_handles_labels()
    rows = -(-len(labels) // 5)
    figure.legend(handles, labels, loc="lower center", ncols=5, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.035 * rows + 0.01, 1, 1))
    _save(figure, path)


def _draw_line(
    panel: Any, comparison: Comparison, line: Sequence[Cell], part: str, name: str, color: Any
) -> None:
    draw_band(
        panel,
        comparison,
        line,
        part,
        color=color,
        linewidth=2.4 if name in LOUD else 1.1,
        linestyle="--" if name == "oracle" else "-",
        label=title_of(name),
    )


def _draw_ablation(comparison: Comparison, path: Path) -> None:
    """Draws the points that each change to the paper's method gains, in a panel for each budget."""
    from matplotlib import pyplot

    cells = comparison.cells
    names = [name for name, variant in VARIANTS.items() if variant.group == "ablation"][::-1]
    names = [name for name in names if any((name, b) in cells for b in ABLATED_AT)]
    figure, panels = pyplot.subplots(
        1,
        len(ABLATED_AT),
        figsize=(13, 1.6 + 0.36 * len(names)),
        sharey=True,
        layout="constrained",
    )
    for panel, budget in zip(panels, ABLATED_AT, strict=True):
        paper = cells.get(("paper", budget))
        for part, color, shift in (("again", "tab:blue", 0.15), ("other", "tab:orange", -0.15)):
            for i, name in enumerate(names):
                cell = cells.get((name, budget))
                if cell is None or paper is None:
                    continue
                gain = comparison.difference(cell, paper, part)
                panel.plot([100 * gain.low, 100 * gain.high], [i + shift] * 2, color=color)
                panel.plot(
                    100 * gain.value,
                    i + shift,
                    "o",
                    color=color,
                    markersize=4,
                    label=PANELS[part] if i == 0 else None,
                )
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_yticks(range(len(names)), [title_of(name) for name in names])
        panel.set_xlabel("points gained, with 95 % intervals")
        panel.set_title(f"{budget:.0%} of the bytes", fontsize=10)
        panel.grid(axis="x", alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)
