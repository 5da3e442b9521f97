"""A policy that another package registered, in the inspector and in the benchmarks."""

import dataclasses

import pytest
from starkv_lab.inspection.collect import collect
from starkv_lab.inspection.command import InspectOptions
from starkv_lab.inspection.page import render
from starkv_lab.quality.command import QualityOptions, chosen, run_quality

from lab.tests.support.inspection_prompts import tiny_prompt
from starkv_compile import StarKVConfig
from starkv_compile.policies import registry
from tests.support.docs import code_blocks, defined_by


@pytest.fixture(autouse=True)
def value_norm(monkeypatch):
    """The policy of docs/guides/writing-a-policy.md, registered."""
    module = defined_by(code_blocks("guides/writing-a-policy.md")[0], "my_package")
    point = registry.EntryPoint("value_norm", "my_package:ValueNorm", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    registry._registered.cache_clear()
    yield module.ValueNorm
    registry._registered.cache_clear()


@pytest.mark.slow
def test_the_inspector_ranks_by_it(value_norm):
    config = InspectOptions(policy="value_norm").config()
    assert config.policy == value_norm()
    prompt = tiny_prompt("qwen2_vl", grids=((4, 5), (4, 5)))
    found = collect(prompt, dataclasses.replace(config, budget=0.3), (0.3,))
    assert [axis.name for axis in found.axes] == ["attention", "final"]
    assert found.budgets[0].places(0) != list(range(found.budgets[0].kept[0]))
    assert '"policy":"value_norm"' in render(found)


def test_the_inspector_shows_an_instance_that_nobody_registered(value_norm):
    class Own(value_norm):
        pass

    prompt = tiny_prompt("qwen2_vl", grids=((4, 5), (4, 5)))
    config = StarKVConfig(budget=0.3, policy=Own(screen_weight=0.25))
    page = render(collect(prompt, config, (0.3,)))
    assert '"policy":"Own","options":{' in page
    assert '"screen_weight":0.25' in page


@pytest.mark.slow
def test_a_benchmark_measures_it(tmp_path):
    assert [variant.name for variant in chosen(["value_norm"])] == ["value_norm"]
    options = QualityOptions(
        policies=["value_norm"],
        budgets=[0.2],
        seed=0,
        threads=1,
        out=tmp_path,
        questions=48,
        frames=(2,),
    )
    file = run_quality(options)
    cell = file.cells["value_norm", 0.2]
    assert 0 < cell.nbytes < cell.full_nbytes
    assert cell.options["policy"] == "value_norm"
    again = run_quality(options)
    assert again.cells["value_norm", 0.2].options == cell.options, "it goes on where it was"
