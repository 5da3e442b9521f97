"""Options are refused at once, by name, with the way out."""

import dataclasses
import json
from fractions import Fraction

import pytest
import torch

import starkv_compile
from starkv_compile import OptionError, StarKVConfig
from starkv_compile.options import Options
from starkv_compile.policies import POLICIES, ScreenNovelty, StarKV
from starkv_compile.testing import tiny_model

BAD_BUDGETS = (0, -0.1, float("nan"), float("inf"), 1.5, "20", "0.2", True, None)


@pytest.mark.parametrize("budget", BAD_BUDGETS, ids=repr)
def test_impossible_budget(budget):
    with pytest.raises(OptionError, match="budget=") as error:
        StarKVConfig(budget=budget)
    assert repr(budget) in str(error.value)


def test_budget_hints_name_the_way_out():
    with pytest.raises(OptionError, match=r"budget_tokens=2048 for a number of tokens"):
        StarKVConfig(budget=2048)
    with pytest.raises(OptionError, match=r"budget=0\.2 for 20 %"):
        StarKVConfig(budget=20)
    with pytest.raises(OptionError, match="without quotes"):
        StarKVConfig(budget="20")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budget_tokens", 1),
        ("budget_tokens", 2.5),
        ("decode_tokens", 0),
        ("window", 0),
        ("window", 65),
        ("pool", 4),
        ("boost", -1),
        ("mi_weight", 1.1),
        ("mi_ramp_steps", 0),
        ("entropy", "on"),
        ("entropy_low", 0),
        ("grid", "round"),
        ("inner", "onnx"),
        ("policy", "none"),
        ("debug", 1),
    ],
)
def test_impossible_value(name, value):
    with pytest.raises(OptionError, match=f"{name}="):
        StarKVConfig.from_options({name: value})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"compression_ratio": 0.8}, "budget=0.2"),
        ({"keep_ratio": 0.3}, "budget=0.3"),
        ({"max_capacity_prompts": 512}, "budget_tokens=512"),
        ({"window_size": 16}, "window=16"),
        ({"kernel_size": 7}, "pool=7"),
    ],
)
def test_options_of_other_libraries_are_told_by_our_names(theirs, ours):
    with pytest.raises(OptionError, match=f"Here it is {ours}$"):
        StarKVConfig.from_options(theirs)
    name, value = ours.split("=")
    StarKVConfig.from_options({name: float(value) if "." in value else int(value)})


def test_typed_options_are_those_of_the_configuration_and_the_policies():
    """Type checkers read `Options`; each name and type is that of a field."""
    fields = [f for c in (StarKVConfig, *POLICIES.values()) for f in dataclasses.fields(c)]
    wanted = {field.name: field.type for field in fields}
    wanted |= {"policy": "Policy | str"}
    typed = {name: kind.__forward_arg__ for name, kind in Options.__annotations__.items()}
    assert typed == wanted


def test_a_model_that_is_not_loaded_yet():
    with pytest.raises(TypeError, match=r"compile got 'UI-TARS'.*load it first, with transformers"):
        starkv_compile.compile("UI-TARS")


def test_unknown_option_lists_the_known_ones():
    with pytest.raises(OptionError, match=r"'budgt'.*did you mean 'budget'.*known: budget"):
        StarKVConfig.from_options({"budgt": 0.2})


@pytest.mark.parametrize("options", [{"budget": 1.5}, {"nonsense": 1}])
def test_every_way_in_refuses_at_once(options):
    model = tiny_model("llava")
    with pytest.raises(OptionError):
        torch.compile(model, backend="starkv", options=options)
    with pytest.raises(OptionError):
        model.compile(backend="starkv", options=options)
    with pytest.raises(OptionError):
        starkv_compile.compile(model, **options)


def test_frozen_and_keyword_only():
    config = StarKVConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.budget = 0.5
    with pytest.raises(TypeError):
        StarKVConfig(0.5)


def test_a_budget_of_many_digits_is_a_short_fraction():
    """Graphs multiply its numerator by a number of tokens, in 64 bits."""
    thirds, sums = (StarKVConfig(budget=b).fraction for b in (1 / 3, 0.1 + 0.2))
    assert (thirds, sums) == (Fraction(1, 3), Fraction(3, 10))
    for budget in (0.123456789123, 1e-12, 1 - 1e-9):
        fraction = StarKVConfig(budget=budget).fraction
        assert 0 < fraction.numerator * 2**31 < 2**63
        assert float(fraction) == pytest.approx(budget, abs=1e-9)


def test_budget_is_an_exact_fraction():
    # 0.07 * 100 is 7.000000000000001 in floats and 0.29 * 100 is 28.999999999999996.
    assert StarKVConfig(budget=0.07).capacity(100) == 7
    assert StarKVConfig(budget=0.29).capacity(100) == 29
    assert StarKVConfig(budget_tokens=64).capacity(10_000) == 64


@pytest.mark.parametrize(
    "config",
    [
        StarKVConfig(),
        StarKVConfig.paper(budget=0.1, window=4),
        StarKVConfig(policy=ScreenNovelty(text_weight=4), layer_budgets=(1, 2)),
        StarKVConfig(policy="random", inner="eager"),
    ],
    ids=lambda config: config.policy.name,
)
def test_options_round_trip(config):
    assert StarKVConfig.from_options(config.to_options()) == config
    described = json.loads(json.dumps(config.describe()))
    assert StarKVConfig.from_options(described) == config
    assert set(described) > {"budget", "inner", "policy", *config.policy.options()}


def test_a_near_policy_is_named():
    with pytest.raises(OptionError, match=r"did you mean 'snapkv'. expected an instance"):
        StarKVConfig(policy="snap_kv")


def test_the_paper_s_options_are_all_there():
    """The knobs of the release's table; what they are called there is in brackets in their docs."""
    config = StarKVConfig.paper(decay_warm_steps=20, mi_warm_steps=0, frame_floor=0.1)
    assert config.policy == StarKV(
        entropy="global", grid="square", decay_warm_steps=20, mi_warm_steps=0, frame_floor=0.1
    )
