"""docs/models.md: one line a family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from .probe import BUDGET, Row

HEADER = """# Models

Every image-text-to-text family of transformers {transformers}, and some of text alone: a tiny
model of each, built from the family's own default configuration with one layer of each kind, run
with a prompt of two images of different shape where the family's inputs can be made here, on
torch {torch}. Written by `starkv models --out docs/models.md`.

{summary}

* **compressed**: at a budget of {budget} each rewritten layer stores exactly the tokens it
  should, the images' tokens are recognised, with the rows and columns they truly have where the
  layout is "grid" or "positions", and at a budget of 100 % the logits are bit-identical to those
  of the inner backend alone.
* **images**: two in the prompt; "beside": given next to the prompt, and the model attends to them
  or inserts them where it likes; or none, where the family's inputs cannot be made here.
* **uncompressed**: nothing is compressed, and the output is what it would be without this package.
* **not tried**: no tiny model of the family can be built or run here; the reason is transformers'.

| family | | attentions rewritten | tokens kept | images | layout | graph breaks | left, and why |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def markdown(rows: Sequence[Row]) -> str:
    return headed(HEADER.replace("{budget}", f"{BUDGET:.0%}"), rows, line)


def headed(header: str, rows: Sequence[Any], line: Callable[[Any], str]) -> str:
    """The lines of `rows` below `header`, which names versions and counts verdicts."""
    counts = Counter(row.verdict for row in rows)
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    head = header.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        summary=f"{len(rows)} families: {summary}.",
    )
    return head + "".join(f"{line(row)}\n" for row in rows)


def line(row: Row) -> str:
    """The family's line. Nothing in it depends on the machine."""
    if row.verdict == "not tried":
        return f"| {row.family} | not tried | | | | | | {_plain(row.failure)} |"
    reasons = [f"{count} x {reason}" for reason, count in row.skipped.items()]
    if not row.found:
        reasons = ["no attention over a cached prompt recognised", *row.refused]
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
