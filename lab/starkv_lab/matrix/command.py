"""`starkv models`: tries families, says what was found, and writes the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers

from starkv_compile.cli import progress
from starkv_compile.files import check_writable, replace_file

from .checkpoints import asked_families
from .exports import probe_export, table
from .markdown import line, markdown
from .probe import probe
from .tiny import families
from .words import in_words


def run_models(names: Sequence[str], out: Path | None, exports: bool = False) -> int:
    """Tries the families `names`, or all if there are none, and prints what was found.

    Args:
        names: families, checkpoint folders, or names of known checkpoints.
        out: file for the whole table, or None.
        exports: whether to try the export instead of compilation.

    Returns:
        The exit code: 1 if a family gives wrong results, else 0.

    Raises:
        OptionError: a name leads to no family of the installed transformers.
    """
    known = families()
    asked = asked_families(names, known)
    for said in dict.fromkeys(sentence for each in asked.values() for sentence in each):
        print(said, flush=True)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns about default configurations
    try:
        if exports:
            return _run(list(asked or known), out, probe_export, str, table)
        return _run(list(asked or known), out, probe, in_words if asked else line, markdown)
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
    for number, name in enumerate(names, 1):
        progress(f"trying a tiny random model of {name} ({number} of {len(names)})")
        rows.append(probe(name))
        print(line(rows[-1]), flush=True)
    if out is not None:
        replace_file(out, table(rows).encode())
    return int(any(row.verdict == "WRONG" for row in rows))
