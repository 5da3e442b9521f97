"""Writes docs/models.md, with one line for each family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from starkv_compile import OptionError
from starkv_compile.errors import did_you_mean

from .probe import BUDGET, Row, probe
from .tiny import families

HEADER = """# Models

`starkv models --out docs/models.md` writes this page. It tries every image-text-to-text family of
transformers {transformers}, and some text families, on torch {torch}. Each family gets a tiny
model, built from its own default configuration with one layer of each kind. The prompt has two
images of different shape if the command can make the family's inputs, and text only otherwise.

{summary}

* **compressed**: at a budget of {budget} each rewritten layer stores exactly the tokens that it
  should. The cache recognises the images' tokens, and knows their true rows and columns where the
  layout is "grid" or "positions". At a budget of 100 % the logits are bit-identical to those of
  the inner backend alone.
* **uncompressed**: no layer is compressed, and the output is the same as without this package.
* **not tried**: transformers cannot build or run a tiny model of the family here. The last column
  gives its error.
* **images**: "two" images are in the prompt. "separate" images are not tokens of the prompt: the
  model attends to them or inserts them itself. "none" means that the prompt has text only.

| family | result | attentions rewritten | tokens kept | images | layout | graph breaks \
| not rewritten, and why |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


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
            from .exports import probe_export, table

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
    for name in names:
        rows.append(probe(name))
        print(line(rows[-1]), flush=True)
    if out is not None:
        out.write_text(table(rows))
    return int(any(row.verdict == "WRONG" for row in rows))


def markdown(rows: Sequence[Row]) -> str:
    return headed(HEADER.replace("{budget}", f"{BUDGET:.0%}"), rows, line)


def headed(header: str, rows: Sequence[Any], line: Callable[[Any], str]) -> str:
    """Returns the lines of `rows` below `header`, filled in with versions and counts."""
    counts = Counter(row.verdict for row in rows)
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    head = header.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        summary=f"{len(rows)} families: {summary}.",
    )
    return head + "".join(f"{line(row)}\n" for row in rows)


def line(row: Row) -> str:
    """Returns the family's line. It is the same on every machine."""
    if row.verdict == "not tried":
        return f"| {row.family} | not tried | | | | | | {_plain(row.failure)} |"
    reasons = [f"{count} x {reason}" for reason, count in row.skipped.items()]
    if not row.found:
        reasons = ["the passes found no attention over a cached prompt", *row.refused]
    cells = [
        row.family,
        row.verdict,
        f"{row.rewritten} of {row.found}",
        f"{row.kept} of {row.seen}" if row.rewritten else "all",
        row.images,
        row.layout if row.rewritten else "",
        str(row.breaks),
        "; ".join([*reasons, row.fault] if row.fault else reasons),
    ]
    return "| " + " | ".join(map(_plain, cells)) + " |"


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
