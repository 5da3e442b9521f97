"""The benchmark's own parts, on a size of a second: what it compares, and how it counts."""

import json

import pytest
import torch
from starkv_lab.environment import environment

from benchmarks import __main__ as program
from benchmarks import kvpress_sets, layers, results
from benchmarks.contenders import CONTENDERS
from benchmarks.layers import Layer, Size, make_inputs
from tests.support.crossing import slow


@pytest.fixture
def size(monkeypatch):
    monkeypatch.setitem(layers.SCREENS, "tiny", (10, 10))
    return Size(Layer("small", 4, 2, 16, 32), "tiny", 3, 8, 0.2, torch.float32)


CHECKED = [
    name
    for name, contender in CONTENDERS.items()
    if contender.role == "ours" or name == "release, restated"
]


@pytest.mark.parametrize("name", [slow(CHECKED[0], ci=True), *map(slow, CHECKED[1:])])
def test_all_keep_what_the_reference_keeps(size, name):
    inputs = make_inputs(size, "cpu")
    work = CONTENDERS[name].make(size, inputs)
    with torch.no_grad():
        program.check(name, work, size, inputs)
        assert work().shape == (1, int(0.2 * size.length))


@pytest.mark.slow(ci=True)
def test_a_contender_that_keeps_something_else_is_not_measured(size):
    inputs = make_inputs(size, "cpu")
    kept = torch.arange(int(0.2 * size.length))[None]
    with pytest.raises(SystemExit, match=r"ours at small .*: keeps \d+.*% of the reference"):
        program.check("ours", lambda: kept, size, inputs)


def test_ratios_are_of_the_same_round(size):
    result = results.Result.of(size, "rival", "rival", [2.0, 8.0, 3.0], [1.0, 2.0, 3.0])
    assert (result.ratio_low, result.ratio, result.ratio_high) == (1.5, 2.0, 3.0)
    assert result.milliseconds == 3000


def test_every_row_says_where_it_was_measured(size, tmp_path):
    rows = [results.Result.of(size, name, "ours", [1.0], [1.0]) for name in ("ours", "other")]
    results.write(rows, environment("cpu"), tmp_path)
    for row in json.loads((tmp_path / "results.json").read_text()):
        assert row["torch"] == torch.__version__
        assert {"commit", "cpu", "threads", "gpu"} <= row.keys()
    assert (tmp_path / "results.csv").read_text().count("\n") == 3


def test_sets_are_compared_head_by_head():
    """One token of one head swapped is one token fewer, without kvpress."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "query": torch.randn(1, 4, kvpress_sets.LENGTH, 8, generator=generator),
        "key": torch.randn(1, kvpress_sets.GROUPS, kvpress_sets.LENGTH, 8, generator=generator),
    }
    tensors["value"] = tensors["key"]
    same = kvpress_sets.ours("snapkv", 0.05, tensors, 100).clone()
    other = same.clone()
    other[2, 0] = next(place for place in range(200) if place not in set(same[2].tolist()))
    for peer, both in ((same, 400), (other, 399)):
        lines = kvpress_sets.rows({**tensors, "found": {("snapkv", 0.05): peer}})
        assert lines == [("snapkv 5%", 100, 100, both)]
