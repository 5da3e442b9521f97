"""The demo's two tables: what was answered, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table
from rich.text import Text

from .turns import Turn
from .ways import Measured


def answer_table(turns: Sequence[Turn], results: Sequence[Measured]) -> Table:
    """One row a turn, one column a way; marked where the right answer is known."""
    judged = any(turn.question for turn in turns)
    table = Table(title="Answers", title_justify="left", show_lines=True)
    table.add_column("screen")
    table.add_column("question, right answer" if judged else "question")
    for result in results:
        table.add_column(result.way.title)
    for i, turn in enumerate(turns):
        screen = "no new one" if turn.step is None else f"step {turn.step}"
        asked = turn.text + (f"\n= {turn.question.answer}" if turn.question else "")
        table.add_row(screen, asked, *(_judged(turn, result.replies[i]) for result in results))
    if judged:
        table.add_row("", "right answers", *(_score(turns, result) for result in results))
    return table


def _judged(turn: Turn, reply: str) -> Text:
    if turn.question is None:
        return Text(reply)
    if turn.question.is_right(reply):
        return Text(f"right\n{reply}", "green")
    return Text(f"wrong\n{reply}", "red")


def _score(turns: Sequence[Turn], result: Measured) -> str:
    pairs = zip(turns, result.replies, strict=True)
    judged = [turn.question.is_right(reply) for turn, reply in pairs if turn.question]
    return f"{sum(judged)} of {len(judged)}"


def _number(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def cost_table(results: Sequence[Measured]) -> Table:
    """One row a measure, one column a way."""
    table = Table(title="Cost of the session", title_justify="left")
    table.add_column("at its end, or over it")
    for result in results:
        table.add_column(result.way.title, justify="right")
    rows: dict[str, Callable[[Measured], str]] = {
        "tokens seen": lambda r: f"{r.seen:,}",
        "tokens kept, each layer": lambda r: f"{r.stored:,} ({r.stored / r.seen:.0%})",
        "cache, bytes": lambda r: f"{r.nbytes:,}",
        "the same tokens uncompressed, bytes": lambda r: f"{r.full_nbytes:,}",
        "peak of all tensors, bytes": lambda r: _number(r.peak_nbytes),
        "prefill, to the first token, ms a turn": lambda r: f"{1000 * r.first_token_seconds:.1f}",
        "decoding, ms a token": lambda r: f"{1000 * r.token_seconds:.1f}",
        "compiling, s": lambda r: f"{max(0.0, r.first_run_seconds - r.run_seconds):.1f}",
        "all turns once compiled, s": lambda r: f"{r.run_seconds:.2f}",
    }
    for name, read in rows.items():
        table.add_row(name, *map(read, results))
    return table


NOTES = """\
Kept: what the budget allows at the last prompt, and the reply's tokens since then.
Cache: storage of all keys and values. Peak: the most that tensors made during a run held at once, \
cache and working memory but not weights (recorded by torch in a run of its own).
Times are of the second run; compiling is what the first took longer. Prefill: image processing, \
vision tower, prompt, compaction. An agent of 2 M parameters spends its time in Python, not in \
attention: a smaller cache need not be faster here."""
