"""Exports one family's language part, as far as export depends on the family.

The probe captures, rewrites and cuts the prompt's graph. It does not convert the compaction of a
layer, which is the same for all families and takes most of the time. It converts the graph of a
further token, which has all of the family's operations, runs it in ONNX Runtime, and compares.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from starkv_compile import StarKVConfig, UnsupportedModel
from starkv_compile.export.capture import (
    Decode,
    Decoder,
    Prefill,
    Shapes,
    cut_graph,
    decode_ports,
    describe,
    prefill_ports,
    traceable,
)
from starkv_compile.optional import needs

from .markdown import headed
from .prompts import said
from .tiny import FIRST_WORD, LAST_WORD, tiny_model

STORED = 12
FAR = 1e-3
"""Largest allowed difference of logits, as a share of the largest logit."""

HEADER = """# Families that export

`starkv models --exports --out docs/export_families.md` writes this page. It exports the language
part of a tiny model of every family in [models.md](models.md), with transformers {transformers},
torch {torch}.

{summary}

* **exports**: export captures the prompt's graph and compacts every layer, all by the same graph.
  The graph of a further token gives the model's logits in ONNX Runtime. The vision tower, if there
  is one, is converted. The tests in `tests/export` convert the compaction itself.
* **language part**: the language part exports, but export does not know the family's vision tower,
  so `starkv export` refuses the model.
* **refused**: export refuses the model, for the reason in the last column.
* **not tried**: transformers cannot build a tiny model of the family here.

| family | result | why |
| --- | --- | --- |
"""


@dataclass(frozen=True)
class ExportRow:
    """Holds a family's row: "exports", "language part", "refused", "not tried" or "WRONG"."""

    family: str
    verdict: str
    why: str = ""

    def __str__(self) -> str:
        return (
            f"| {self.family} | {self.verdict} | {' '.join(self.why.split()).replace('|', '/')} |"
        )


def probe_export(family: str) -> ExportRow:
    """Exports the language part of a tiny model of `family`."""
    for package in ("onnxscript", "onnxruntime"):
        needs(package)
    try:
        model = tiny_model(family)
    except Exception as error:  # a family may raise anything on this configuration
        return ExportRow(family, "not tried", said(error))
    try:
        with _quiet():
            fault = _export(model)
            why = _why_no_tower(model)
    except UnsupportedModel as error:
        return ExportRow(family, "refused", str(error))
    except Exception as error:  # a fault of export
        return ExportRow(family, "WRONG", said(error))
    if fault:
        return ExportRow(family, "WRONG", fault)
    return ExportRow(family, "language part" if why else "exports", why)


def table(rows: Sequence[ExportRow]) -> str:
    return headed(HEADER, rows, str)


def _export(model: Any) -> str:
    """Returns what is wrong with the graph of a further token, or ""."""
    from starkv_compile.export.onnx import OPSET, Weights, write_decode

    decoder = Decoder(model)
    shapes = describe(model, decoder)
    with traceable(decoder.decoder), tempfile.TemporaryDirectory() as folder:
        prompt = Prefill(decoder, shapes).eval()
        cut_graph(prompt, prefill_ports(shapes), StarKVConfig(budget=0.3))
        write_decode(decoder, shapes, OPSET, Weights(Path(folder)))
        return _fault(decoder, shapes, Path(folder) / "decode.onnx")


def _why_no_tower(model: Any) -> str:
    """Returns why the vision tower is not exported, or "" if it is or there is none."""
    from starkv_compile.export.onnx import OPSET, Weights, export_visual

    with tempfile.TemporaryDirectory() as folder:
        try:
            export_visual(model, Weights(Path(folder)), OPSET, lambda text: None)
        except UnsupportedModel as error:
            return str(error)
    return ""


def _fault(decoder: Decoder, shapes: Shapes, file: Path) -> str:
    from starkv_compile.export.onnx import Graph

    ports = decode_ports(shapes).inputs
    sizes = {"batch": 2, "stored": STORED, "seen": 3 * STORED}
    torch.manual_seed(0)
    feeds = {
        port.name: torch.randn(port.shape(sizes)).to(port.dtype)
        if port.name.startswith("past.")
        else torch.ones(port.shape(sizes), dtype=port.dtype)
        for port in ports
    }
    feeds["input_ids"].random_(FIRST_WORD, LAST_WORD)
    feeds["position_ids"] *= 3 * STORED - 1
    mine = Graph(file)(feeds)["logits"]
    with torch.no_grad():
        theirs = Decode(decoder, shapes)(feeds)["logits"]
    apart = float((mine - theirs).abs().max() / theirs.abs().max())
    return "" if apart <= FAR else f"logits of a further token differ by {apart:.1%}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what exporters print before they raise an error."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
