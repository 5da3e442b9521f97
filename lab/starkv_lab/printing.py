"""Prints tables for people."""

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
