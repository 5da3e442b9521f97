"""Makes the demo's two tables: the answers, and the costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table
from rich.text import Text

from starkv_compile.reporting import readable_bytes

from .turns import Turn
from .ways import Measured


def answer_table(turns: Sequence[Turn], results: Sequence[Measured]) -> Table:
    """Makes a row for each turn and a column for each cache. Marks which answers are right."""
    judged = any(turn.question for turn in turns)
    table = Table(title="Answers", title_justify="left", show_lines=True)
    table.add_column("screenshot")
    table.add_column("question = right answer" if judged else "question")
    for result in results:
        table.add_column(result.way.title)
    for i, turn in enumerate(turns):
        screen = "none" if turn.step is None else f"step {turn.step}"
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


def _peak(number: int | None) -> str:
    return "not measured" if number is None else readable_bytes(number)


def cost_table(results: Sequence[Measured]) -> Table:
    """Makes a row for each measure and a column for each cache."""
    table = Table(title="Cost of the session", title_justify="left")
    table.add_column("")
    for result in results:
        table.add_column(result.way.title, justify="right")
    rows: dict[str, Callable[[Measured], str]] = {
        "tokens seen": lambda r: f"{r.seen:,}",
        "tokens kept in each layer": lambda r: f"{r.stored:,} ({r.stored / r.seen:.0%})",
        "cache": lambda r: readable_bytes(r.nbytes),
        "a full cache": lambda r: readable_bytes(r.full_nbytes),
        "peak of all tensors": lambda r: _peak(r.peak_nbytes),
        "prefill, ms per turn": lambda r: f"{1000 * r.first_token_seconds:.1f}",
        "decode, ms per token": lambda r: f"{1000 * r.token_seconds:.1f}",
        "compilation, s": lambda r: f"{max(0.0, r.first_run_seconds - r.run_seconds):.1f}",
        "all turns after compilation, s": lambda r: f"{r.run_seconds:.2f}",
    }
    for name, read in rows.items():
        table.add_row(name, *map(read, results))
    return table


QUESTIONS = """\
The agent was trained on four forms of questions. "click" and "where" name an element and ask for \
its place; "what" gives a place and asks what is there; "return" gives the place of an element on \
an older screenshot and asks where it is now. Places are x and y from 0 to 1000."""

NOTES = """\
Tokens kept are those that the budget allows at the last prompt, plus the tokens of the last \
reply, which are stored as they are.
The cache holds all keys and values. The peak counts all tensors that a run makes, cache included, \
weights excluded. torch records it in a separate run.
Times come from the second run. Compilation is the extra time of the first run. Prefill covers \
image processing, vision tower, prompt and compaction, up to the first token of the reply. \
This agent has 2.5 M parameters and spends most of its time in Python. A smaller cache does not \
have to be faster here."""
