"""Hand-made replies: their accuracy by part, their differences, the CSV, the plots."""

import csv

import numpy as np
import pytest
from starkv_lab.quality.cells import CellFile
from starkv_lab.quality.design import COLUMNS, Design
from starkv_lab.quality.plot import draw_plots
from starkv_lab.quality.tables import Comparison, accuracy_table, write_csv

from lab.tests.support.hand_made import cell
from starkv_compile import StarKVError

DESIGN = Design.of(1, frames=(1, 2))
ONLY_OTHER = np.array([column == "other" for column in COLUMNS])


def test_accuracy_by_part():
    half = ONLY_OTHER & (np.arange(DESIGN.prompts)[:, None] % 2 == 0)
    compared = Comparison(DESIGN, [cell(DESIGN, right=half)])
    (found,) = compared.cells.values()
    assert compared.accuracy(found, "other").value == 0.5
    assert compared.accuracy(found, "again") == (0, 0, 0)
    assert compared.accuracy(found, "all").value == pytest.approx(1 / 6)  # ways weigh the same
    low, high = compared.accuracy(found, "other")[1:]
    half_width = 1.96 * 0.5 / DESIGN.prompts**0.5  # a prompt's four are right or wrong together
    assert high - low == pytest.approx(2 * half_width, rel=0.15)


def test_differences_are_of_the_same_questions():
    bits = np.random.default_rng(0).random((DESIGN.prompts, len(COLUMNS))) < 0.5
    full, worse = cell(DESIGN, "full", 1.0), cell(DESIGN, "default", right=bits)
    better = cell(DESIGN, "paper", right=bits | ONLY_OTHER)
    rows = {
        (row.cell.variant, row.part): row
        for row in Comparison(DESIGN, [full, worse, better]).rows()
    }
    assert rows["full", "all"].minus_full == (0, 0, 0)
    assert rows["full", "all"].minus_default is None  # not measured at this budget
    assert rows["paper", "again"].minus_default == (0, 0, 0)
    assert rows["paper", "other"].minus_default.low > 0.3
    assert rows["default", "other"].minus_full.high < -0.3
    assert rows["paper", "other"].questions == 4 * DESIGN.prompts


def test_a_csv_for_others(tmp_path):
    file = CellFile(tmp_path, DESIGN, {})
    for made in (cell(DESIGN, "full", 1.0), cell(DESIGN, right=ONLY_OTHER, same=False)):
        file.add(made)
    write_csv(file, tmp_path / "quality.csv")
    with (tmp_path / "quality.csv").open() as lines:
        rows = {(r["variant"], r["part"]): r for r in csv.DictReader(lines)}
    paper = rows["paper", "all"]
    assert float(paper["accuracy"]) == pytest.approx(1 / 3, abs=1e-4)
    assert float(paper["minus_full"]) == pytest.approx(-2 / 3, abs=1e-4)
    assert (paper["minus_default"], paper["byte_share"], paper["agreement"]) == ("", "0.2", "0")
    assert float(paper["kl_other"]) == 0.3
    assert accuracy_table(DESIGN, list(file.cells.values())).row_count == 2


def test_documents_are_made_from_the_file_alone(tmp_path):
    pytest.importorskip("matplotlib")
    file = CellFile(tmp_path, DESIGN, {})
    file.add(cell(DESIGN, "full", 1.0))
    for budget in (0.2, 0.1):
        file.add(cell(DESIGN, "paper", budget, right=ONLY_OTHER))
    made = [path.name for path in draw_plots(tmp_path, tmp_path / "docs")]
    assert made == ["quality-tables.md", "quality.png"]
    file.add(cell(DESIGN, "pool-1", 0.2))
    tables, *pictures = draw_plots(tmp_path, tmp_path / "docs")
    assert [p.name for p in pictures] == ["quality.png", "quality-ablation.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    with pytest.raises(StarKVError, match="no file of measured cells"):
        draw_plots(tmp_path / "nowhere", tmp_path)
    text = tables.read_text()
    assert text.index("## 100%") < text.index("## 20%") < text.index("## 10%")
    assert "| STaR-KV, the paper's options | 33.3 (33-33) | 0.0 (0-0) |" in text
    assert "| -66.7 (-66.7 to -66.7) | 100% | 20.0% |" in text
    gained = "**+100.0 (+100.0 to +100.0)** | +0.0 (+0.0 to +0.0)"
    assert f"| paper, scores not pooled | {gained} |  |  |" in text


def test_answers_against_bytes_for_kept_tokens_in_few_bits(tmp_path):
    pytest.importorskip("matplotlib")
    file = CellFile(tmp_path, DESIGN, {})
    for variant, right in (
        ("default", True),
        ("screen_novelty-4-bits", ONLY_OTHER),
        ("tova", True),
    ):
        file.add(cell(DESIGN, variant, 0.2, right=right))
    file.add(cell(DESIGN, "full", 1.0))
    table, picture = draw_plots(tmp_path, tmp_path / "docs")[-2:]
    assert (table.name, picture.name) == ("quality-bits.md", "quality-bits.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = table.read_text()
    assert "| 20.0 | 20 | not rounded | screen novelty (our default) | 100.0 (100-100) |" in text
    assert "| 4 bits | screen novelty (our default) | 33.3 (33-33) | -66.7" in text
    assert "TOVA" not in text, "never measured in few bits"
