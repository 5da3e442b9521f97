"""Writes the results of a run: a printed table, rows with their environment, and a plot."""

from __future__ import annotations

import csv
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from .layers import Size


@dataclass(frozen=True)
class Result:
    """Holds the milliseconds of one contender at one size, and their ratio to `ours`.

    The ratio is the median over rounds of (this one / ours in the same round). Low and high are its
    quartiles.
    """

    size: str
    contender: str
    role: str
    milliseconds: float
    ratio: float
    ratio_low: float
    ratio_high: float

    @classmethod
    def of(
        cls, size: Size, name: str, role: str, seconds: list[float], ours: list[float]
    ) -> Result:
        ratios = sorted(a / b for a, b in zip(seconds, ours, strict=True))
        low, middle, high = (
            statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        )
        median = statistics.median(seconds) * 1e3
        return cls(str(size), name, role, median, middle, low, high)


def table(results: list[Result]) -> str:
    lines = []
    size = None
    for result in results:
        if result.size != size:
            size = result.size
            lines += ["", size, f"  {'':30s} {'ms':>10s} {'x ours':>9s}  quartiles"]
        lines.append(
            f"  {result.contender:30s} {result.milliseconds:10.2f} {result.ratio:9.2f}  "
            f"{result.ratio_low:.2f} to {result.ratio_high:.2f}"
        )
    return "\n".join(lines)


def write(results: list[Result], where: dict[str, str | int], folder: Path) -> None:
    """Writes `results.json`, `results.csv` (every row has the environment) and `results.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(result), **where} for result in results]
    (folder / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    try:
        import matplotlib
    except ImportError:
        print("no plot, because matplotlib is not installed: pip install matplotlib")
        return
    matplotlib.use("Agg")
    _plot(results, folder / "results.png")


def _plot(results: list[Result], path: Path) -> None:
    """Draws the ratio of each contender to ours on a logarithmic axis, a panel for each size."""
    from matplotlib import pyplot

    sizes = list(dict.fromkeys(result.size for result in results))
    figure, panels = pyplot.subplots(
        len(sizes), 1, figsize=(9, 2.6 * len(sizes)), squeeze=False, layout="constrained"
    )
    colors = {"ours": "tab:green", "rival": "tab:red", "floor": "tab:gray"}
    for panel, size in zip(panels[:, 0], sizes, strict=True):
        here = [result for result in results if result.size == size][::-1]
        spread = [
            [result.ratio - result.ratio_low for result in here],
            [result.ratio_high - result.ratio for result in here],
        ]
        panel.barh(
            [result.contender for result in here],
            [result.ratio for result in here],
            xerr=spread,
            color=[colors[result.role] for result in here],
        )
        panel.set_xscale("log")
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(size, fontsize=9)
        panel.set_xlabel("times the time of `ours`")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
