"""Parameters of which `make test` runs a part: it meets every value once, and not every pair."""

from collections.abc import Sequence

import pytest


def slow(*values, ci=False):
    """One set of values, for `parametrize`, that `make test` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow(ci=ci))


def crossed(rows: Sequence, columns: Sequence) -> list:
    """All pairs; slow are those of neither the first row nor the first column."""
    return [
        (row, column) if row == rows[0] or column == columns[0] else slow(row, column)
        for row in rows
        for column in columns
    ]


def first_only(values: Sequence, ci=False) -> list:
    """All values; slow are those after the first. A tuple is of several arguments."""
    first, *others = values
    return [first, *(slow(*v, ci=ci) if isinstance(v, tuple) else slow(v, ci=ci) for v in others)]


def first_in_ci(values: Sequence) -> list:
    """All values; slow are all of them, and CI runs the first. A tuple is of several arguments."""
    first, *others = (value if isinstance(value, tuple) else (value,) for value in values)
    return [slow(*first, ci=True), *(slow(*value) for value in others)]
