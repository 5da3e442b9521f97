"""Writes docs/models.md, with one line for each family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from .checkpoints import checkpoint_table
from .probe import BUDGET, Row

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

`starkv models UI-TARS-1.5-7B` says the same in words about the family of a checkpoint:

{checkpoints}

| family | result | attentions rewritten | tokens kept | images | layout | graph breaks \
| not rewritten, and why |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def markdown(rows: Sequence[Row]) -> str:
    header = HEADER.replace("{budget}", f"{BUDGET:.0%}")
    return headed(header.replace("{checkpoints}", checkpoint_table()), rows, line)


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
    cells = [
        row.family,
        row.verdict,
        f"{row.rewritten} of {row.found}",
        f"{row.kept} of {row.seen}" if row.rewritten else "all",
        row.images,
        row.layout if row.rewritten else "",
        str(row.breaks),
        "; ".join(reasons_of(row)),
    ]
    return "| " + " | ".join(map(_plain, cells)) + " |"


def reasons_of(row: Row) -> list[str]:
    """Why attentions were not rewritten, and the error of the passes if there was one."""
    reasons = [f"{count} x {reason}" for reason, count in row.skipped.items()]
    if not row.found:
        reasons = ["the passes found no attention over a cached prompt", *row.refused]
    return [*reasons, row.fault] if row.fault else reasons


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
