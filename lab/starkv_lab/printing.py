"""Prints numbers and tables for people."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

WIDEST = 10_000  # columns; no table needs more


def print_table(console: Console, table: Table) -> None:
    """Prints a table so that no number is cut. In a terminal that is too narrow, lines wrap."""
    free = console.options.update(width=WIDEST)
    least = Measurement.get(console, free, table).minimum
    console.print(table, width=max(console.width, least), crop=False, soft_wrap=True)


def readable_bytes(number: int) -> str:
    """Such as "5.5 MiB"; bytes below 1 KiB are exact."""
    if number < 1024:
        return f"{number} bytes"
    for power, unit in ((3, "GiB"), (2, "MiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:,.{power - 1}f} {unit}"
    return f"{number / 1024:,.1f} KiB"
