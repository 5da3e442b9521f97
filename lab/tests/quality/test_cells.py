"""The file of cells: nothing is lost by an interruption, nothing of another design taken over."""

import json

import numpy as np
import pytest
from starkv_lab.quality.cells import Cell, CellFile, read_cells
from starkv_lab.quality.design import COLUMNS, Design

from lab.tests.support.hand_made import cell
from starkv_compile import StarKVConfig, StarKVError

DESIGN = Design.of(1, frames=(1,))
WHERE = {"agent": "abc"}


def test_a_cell_comes_back_as_it_was():
    bits = np.random.default_rng(0).random((DESIGN.prompts, len(COLUMNS))) < 0.3
    before = cell(DESIGN, right=bits, same=~bits)
    after = Cell.from_line(before.to_line())
    assert (after.right == bits).all()
    assert (after.same == ~bits).all()
    assert after.to_line() == before.to_line()


def test_what_was_measured_is_not_measured_again(tmp_path):
    file = CellFile(tmp_path, DESIGN, WHERE)
    file.add(cell(DESIGN, "paper"))
    again = CellFile(tmp_path, DESIGN, WHERE)
    assert again.has("paper", 0.2, StarKVConfig.paper(budget=0.2, inner="eager"))
    assert not again.has("paper", 0.1, StarKVConfig.paper(budget=0.1, inner="eager"))
    assert not again.has("default", 0.2, StarKVConfig(budget=0.2, inner="eager"))
    assert not again.has("paper", 0.2, StarKVConfig.paper(budget=0.2, inner="eager", window=4))


def test_an_option_that_is_no_more(tmp_path):
    file = CellFile(tmp_path, DESIGN, WHERE)
    old = cell(DESIGN, "paper")
    old.options["gone"] = 1
    file.add(old)
    assert not file.has("paper", 0.2, StarKVConfig.paper(budget=0.2, inner="eager"))


def test_a_line_cut_off_is_left_out(tmp_path):
    file = CellFile(tmp_path, DESIGN, WHERE)
    file.add(cell(DESIGN, "paper"))
    file.add(cell(DESIGN, "default"))
    text = file.path.read_text()
    file.path.write_text(text[: len(text) - 100])
    resumed = CellFile(tmp_path, DESIGN, WHERE)
    assert list(resumed.cells) == [("paper", 0.2)]
    resumed.add(cell(DESIGN, "default"))
    assert [c.variant for c in read_cells(file.path)[1]] == ["paper", "default"]


def test_the_last_of_two_counts(tmp_path):
    file = CellFile(tmp_path, DESIGN, WHERE)
    for right in (True, False):
        file.add(cell(DESIGN, "paper", right=right))
    (found,) = read_cells(file.path)[1]
    assert not found.right.any()


@pytest.mark.parametrize(
    ("design", "where"), [(Design.of(1, seed=1, frames=(1,)), WHERE), (DESIGN, {"agent": "xyz"})]
)
def test_another_design_or_agent_is_refused(tmp_path, design, where):
    CellFile(tmp_path, DESIGN, WHERE)
    with pytest.raises(StarKVError, match="give another --out"):
        CellFile(tmp_path, design, where)


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text(json.dumps({"design": {}}) + "\n" + '{"variant": 1}\n')
    with pytest.raises(StarKVError, match="no file of measured cells"):
        read_cells(path)
