"""docs/export_families.md is of today's code: a family of each kind, and what is called wrong."""

from pathlib import Path

import pytest
import transformers
from starkv_lab.matrix import exports
from starkv_lab.matrix.exports import probe_export
from starkv_lab.matrix.tiny import families

for package in ("onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="pip install '.[export]'")

TABLE = (Path(__file__).parents[2] / "docs" / "export_families.md").read_text()
KINDS = {
    "llama": "text alone",
    "gemma3": "sliding layers",
    "mllama": "cross-attention",
    "pix2struct": "a family that cannot be tried",
}
same_version = pytest.mark.skipif(
    f"transformers {transformers.__version__}," not in TABLE,
    reason="the table is of another transformers",
)


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS, ids=KINDS.get)
def test_a_family_of_each_kind(family):
    row = probe_export(family)
    assert row.verdict != "WRONG", row
    if f"transformers {transformers.__version__}," in TABLE:
        command = "starkv models --exports --out docs/export_families.md"
        assert str(row) in TABLE.splitlines(), f"run: {command}"


@same_version
def test_the_table_has_every_family_and_no_wrong_one():
    listed = {row.split(" | ")[0].removeprefix("| ") for row in TABLE.splitlines()}
    assert set(families()) <= listed
    assert "WRONG" not in TABLE


@pytest.mark.slow
def test_a_graph_that_computes_something_else_is_called_wrong(monkeypatch):
    class Scaled(exports.Decode):
        def forward(self, ports):
            found = super().forward(ports)
            return {**found, "logits": 1.01 * found["logits"]}

    monkeypatch.setattr(exports, "Decode", Scaled)
    row = probe_export("llama")
    assert row.verdict == "WRONG"
    assert row.why == "logits of a further token differ by 1.0%"
