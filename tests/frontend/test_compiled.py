"""`with starkv_compile.compiled(model, ...)`: the model is compressed inside and nowhere else."""

import pytest
import torch

import starkv_compile
from starkv_compile import OptionError, StarKVCache, StarKVConfig, UnsupportedModel
from starkv_compile.testing import TinyPrompt, tiny_inputs, tiny_model
from tests.support.crossing import first_in_ci

EAGER = {"inner": "eager"}


def stored(model):
    """Tokens that the first layer stores of a prompt of 68."""
    cache = StarKVCache(model.config)
    with torch.no_grad():
        model(**tiny_inputs("qwen2_vl", TinyPrompt()), past_key_values=cache)
    return cache.compressed_layers[0].stored


def test_compressed_inside_the_block_only():
    model = tiny_model("qwen2_vl")
    with starkv_compile.compiled(model, budget=0.5, **EAGER) as same:
        assert same is model
        assert stored(model) == 34
        assert starkv_compile.report(model).layers[0].stored == 34
    assert stored(model) == 68
    with pytest.raises(UnsupportedModel):
        starkv_compile.report(model)


def test_an_error_in_the_block_ends_it_too():
    model = tiny_model("qwen2_vl")
    with pytest.raises(KeyError), starkv_compile.compiled(model, budget=0.5, **EAGER):
        raise KeyError
    assert stored(model) == 68


@pytest.mark.slow(ci=True)
def test_the_configuration_from_before_comes_back():
    model = tiny_model("qwen2_vl")
    starkv_compile.compile(model, budget=0.25, **EAGER)
    with starkv_compile.compiled(model, StarKVConfig(budget=0.5, **EAGER)):
        assert stored(model) == 34
    assert stored(model) == 17


def test_an_impossible_option_changes_nothing():
    model = tiny_model("qwen2_vl")
    starkv_compile.compile(model, budget=0.25, **EAGER)
    with pytest.raises(OptionError), starkv_compile.compiled(model, budget=2, **EAGER):
        raise AssertionError("the block must not begin")
    assert stored(model) == 17


def test_an_observer_sees_every_layer_of_every_prompt():
    model, seen = tiny_model("qwen2_vl"), []
    observe = lambda inputs: seen.append((inputs.layer, tuple(inputs.key.shape)))  # noqa: E731
    with starkv_compile.compiled(model, budget=0.5, observer=observe, **EAGER):
        stored(model)
        stored(model)
    assert seen == [(0, (1, 2, 68, 16)), (1, (1, 2, 68, 16))] * 2


def test_an_observer_needs_a_graph_that_calls_python():
    with pytest.raises(
        OptionError, match=r"observer=.* with inner='inductor'.* use inner=\"eager\""
    ):
        starkv_compile.compile(tiny_model("qwen2_vl"), observer=print)


def test_any_callable_observes():
    from functools import partial

    model, seen = tiny_model("qwen2_vl"), []
    with starkv_compile.compiled(model, budget=0.5, observer=partial(seen.append), **EAGER):
        stored(model)
    assert len(seen) == 2


@pytest.mark.parametrize(
    "way", first_in_ci(["torch.compile", "model.compile", "starkv_compile.compile"])
)
def test_the_very_same_compilation_comes_back(way):
    model = tiny_model("qwen2_vl")
    if way == "torch.compile":
        outer = torch.compile(model, backend="starkv", options={"budget": 0.25, **EAGER})
    elif way == "model.compile":
        model.compile(backend="starkv", options={"budget": 0.25, **EAGER})
        outer = model
    else:
        outer = starkv_compile.compile(model, budget=0.25, **EAGER)
    assert stored(outer) == 17
    report = starkv_compile.report(outer)
    with starkv_compile.compiled(outer, budget=0.5, **EAGER) as same:
        assert same is outer
        assert stored(model) == 34
    assert stored(outer) == stored(model) == 17
    assert starkv_compile.report(outer) is report


@pytest.mark.slow
def test_somebody_else_s_compilation_comes_back():
    model, calls = tiny_model("qwen2_vl"), []

    def backend(module, inputs):
        calls.append(module)
        return module.forward

    model.compile(backend=backend)
    with starkv_compile.compiled(model, budget=0.5, **EAGER):
        assert stored(model) == 34
        assert not calls
    stored(model)
    assert calls
