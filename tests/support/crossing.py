"""Parameters of which `make test` runs a part: it meets every value once, and not every pair."""

from collections.abc import Iterable, Sequence

import pytest


def slow(*values):
    """One set of values, for `parametrize`, that `make test-all` runs alone."""
    return pytest.param(*values, marks=pytest.mark.slow)


def crossed(rows: Sequence, columns: Sequence) -> Iterable:
    """All pairs; slow are those of neither the first row nor the first column."""
    for row in rows:
        for column in columns:
            usual = row == rows[0] or column == columns[0]
            yield (row, column) if usual else slow(row, column)


def first_only(values: Sequence) -> Iterable:
    """All values; slow are those after the first."""
    return [values[0], *map(slow, values[1:])]
