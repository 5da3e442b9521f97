"""`starkv models`: tries families, prints a line for each, and writes the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers

from starkv_compile import OptionError
from starkv_compile.errors import did_you_mean
from starkv_compile.files import check_writable, replace_file

from .exports import probe_export, table
from .markdown import line, markdown
from .probe import probe
from .tiny import families


def run_models(names: Sequence[str], out: Path | None, exports: bool = False) -> int:
    """Tries the families `names`, or all if there are none, and prints a line for each.

    Args:
        out: file for the whole table, or None.
        exports: whether to try the export instead of compilation.

    Returns:
        The exit code: 1 if a family gives wrong results, else 0.

    Raises:
        OptionError: transformers has no such family.
    """
    known = families()
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise OptionError(
            f"{unknown[0]!r} is no family of transformers {transformers.__version__}: "
            f"{did_you_mean(unknown[0], known)}expected one of {', '.join(sorted(known))}"
        )
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns about default configurations
    try:
        if exports:
            return _run(names or [*known], out, probe_export, str, table)
        return _run(names or [*known], out, probe, line, markdown)
    finally:
        transformers.logging.set_verbosity(level)


def _run(
    names: Sequence[str],
    out: Path | None,
    probe: Callable[[str], Any],
    line: Callable[[Any], str],
    table: Callable[[list[Any]], str],
) -> int:
    rows = []
    if out is not None:
        check_writable(out, "--out")
    for name in names:
        rows.append(probe(name))
        print(line(rows[-1]), flush=True)
    if out is not None:
        replace_file(out, table(rows).encode())
    return int(any(row.verdict == "WRONG" for row in rows))
