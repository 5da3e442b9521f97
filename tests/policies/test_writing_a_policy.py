"""docs/guides/writing-a-policy.md, run as it stands."""

import pytest
import torch

import starkv_compile
from starkv_compile import StarKVCache, StarKVConfig
from starkv_compile.policies import registry
from starkv_compile.testing import TinyPrompt, tiny_inputs, tiny_model
from tests.support.docs import code_blocks, defined_by
from tests.support.one_layer import Attention, X, capture

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or later")

PAGE = "guides/writing-a-policy.md"


@pytest.fixture
def value_norm():
    return defined_by(code_blocks(PAGE)[0], "my_package").ValueNorm


def places(model):
    """What each layer keeps of a prompt of two screens and some text."""
    cache = StarKVCache(model.config)
    with torch.no_grad():
        model(**tiny_inputs("qwen2_vl", TinyPrompt()), past_key_values=cache)
    return [layer.places()[0].tolist() for layer in cache.compressed_layers]


def test_the_page_shows_a_whole_policy_in_thirty_lines(value_norm):
    assert len(code_blocks(PAGE)[0].splitlines()) <= 30
    assert value_norm.options() == ("screen_weight",)
    with pytest.raises(starkv_compile.OptionError, match="screen_weight=2: expected a number"):
        value_norm(screen_weight=2)


@pytest.mark.slow
def test_every_way_in_takes_it(value_norm):
    by_api, by_backend, in_place = (tiny_model("qwen2_vl") for _ in range(3))
    policy = value_norm(screen_weight=0.25)
    options = {"budget": 0.3, "policy": policy, "inner": "eager"}
    starkv_compile.compile(by_api, **options)
    torch.compile(by_backend, backend="starkv", options=options)
    in_place.compile(backend="starkv", options=options)
    kept = places(by_api)
    assert kept == places(by_backend) == places(in_place)
    starkv_compile.undo(by_api)
    starkv_compile.compile(by_api, **{**options, "policy": value_norm(screen_weight=1)})
    assert kept != places(by_api), "its option does something"

    graph = capture(Attention(), X, how="export")
    assert starkv_compile.passes.apply(graph, StarKVConfig(budget=0.5, policy=policy)).rewritten


def test_the_calls_of_the_page_run(value_norm):
    calls = code_blocks(PAGE)[1].splitlines()
    assert len(calls) == 3
    names = {
        "starkv_compile": starkv_compile,
        "torch": torch,
        "ValueNorm": value_norm,
        "StarKVConfig": StarKVConfig,
    }
    for call in calls:
        model, graph_module = tiny_model("qwen2_vl"), capture(Attention(), X, how="export")
        exec(call, {**names, "model": model, "graph_module": graph_module})


def test_the_name_that_the_page_registers(value_norm, monkeypatch):
    (table,) = code_blocks(PAGE, "toml")
    ((name, value),) = tomllib.loads(table)["project"]["entry-points"][registry.GROUP].items()
    point = registry.EntryPoint(name, value, registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    registry._registered.cache_clear()
    try:
        model = tiny_model("qwen2_vl")
        exec(code_blocks(PAGE)[2], {"starkv_compile": starkv_compile, "model": model})
        assert StarKVConfig(policy="value_norm").policy == value_norm()
    finally:
        registry._registered.cache_clear()
