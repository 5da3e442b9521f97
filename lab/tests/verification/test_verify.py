"""`verify` finds nothing wrong in a right cache, and finds planted faults."""

import pytest
import torch
from starkv_lab.agent.checkpoints import load_agent
from starkv_lab.demo.turns import episode_turns
from starkv_lab.verification.verify import verify

import starkv_compile
from starkv_compile import OptionError, StarKVConfig, UnsupportedModel
from starkv_compile.kernels import cpp
from tests.support.crossing import slow

NAMES = ("unchanged", "kept", "first", "later")


@pytest.fixture(scope="module")
def agent():
    return load_agent()


@pytest.fixture(scope="module")
def turns():
    return [turn.content for turn in episode_turns(2, seed=0)][:2]


def found(agent, turns, tokens=4, **options):
    config = StarKVConfig.from_options({"budget": 0.2, "inner": "eager", **options})
    return verify(*agent, turns, config, tokens=tokens)


def verdicts(result):
    return dict(zip(NAMES, (check.verdict for check in result.checks), strict=True))


def details(result):
    return dict(zip(NAMES, (check.detail for check in result.checks), strict=True))


ALL_RIGHT = dict.fromkeys(NAMES, "right")


@pytest.mark.parametrize(
    "options",
    [
        slow({}, ci=True),
        slow({"policy": "snapkv"}, ci=True),  # a set for each head
        slow({"policy": "starkv"}),
        slow({"policy": "pyramidkv"}),
        slow({"decode_tokens": 2}),
        slow({"budget": 1 / 3, "window": 1}),
    ],
    ids=str,
)
def test_a_right_cache(agent, turns, options):
    here = turns[:1] if options.get("policy") == "pyramidkv" else turns  # takes one prompt
    result = found(agent, here, **options)
    assert verdicts(result) == ALL_RIGHT
    assert result.right
    assert details(result)["unchanged"] == details(result)["first"] == "the same bits"
    assert len(result.replies) == len(here)
    assert result.report.nbytes < result.report.layers[0].full_nbytes * 4
    with pytest.raises(UnsupportedModel, match="was not compiled"):
        starkv_compile.report(agent[0])
    assert agent[0].model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_differ_by_their_rounding(turns, dtype):
    model, processor = load_agent()
    assert verdicts(found((model.to(dtype), processor), turns)) == ALL_RIGHT


@pytest.mark.slow
def test_inductor_has_no_scores_to_compare(agent, turns):
    result = found(agent, turns, inner="inductor")
    assert verdicts(result) == {**ALL_RIGHT, "kept": "not checked"}
    assert 'inner="eager"' in details(result)["kept"]


@pytest.mark.slow(ci=True)
def test_a_value_of_another_token_is_found(agent, turns):
    def swap(module, arguments, output):
        for layer in output.past_key_values.layers:
            if layer.stored < layer.seen:
                layer.values[:, 0, 3] = layer.values[:, 0, 4]

    hook = agent[0].register_forward_hook(swap)
    try:
        result = found(agent, turns[:1])
    finally:
        hook.remove()
    assert verdicts(result) == {**ALL_RIGHT, "later": "WRONG"}
    assert not result.right


@pytest.mark.slow(ci=True)
def test_other_kept_tokens_are_found(agent, turns, monkeypatch):
    select = cpp.select_tokens  # which tests run

    def worst(scores, *arguments, **options):
        return select(-scores, *arguments, **options)

    monkeypatch.setattr(cpp, "select_tokens", worst)
    result = found(agent, turns[:1])
    assert verdicts(result) == {**ALL_RIGHT, "kept": "WRONG"}


@pytest.mark.slow
def test_a_model_that_starkv_changes_at_full_budget_is_found(agent, turns, monkeypatch):
    compiled = starkv_compile.compiled

    def disturbed(model, config, **options):
        if config.budget == 1.0:
            config = StarKVConfig(budget=0.5, inner="eager")
        return compiled(model, config, **options)

    monkeypatch.setattr(starkv_compile, "compiled", disturbed)
    assert verdicts(found(agent, turns[:1])) == {**ALL_RIGHT, "unchanged": "WRONG"}


@pytest.mark.slow
def test_one_token_says_nothing_about_later_ones(agent, turns):
    result = found(agent, turns[:1], tokens=1)
    assert verdicts(result) == {**ALL_RIGHT, "later": "not checked"}
    assert "longer replies" in details(result)["later"]


@pytest.mark.slow
def test_an_attention_of_the_models_own_is_said(turns, monkeypatch):
    """A model of remote code may compute its attention without the interface."""
    model, processor = load_agent()
    layers = model.model.language_model.layers
    for layer in layers:
        attention = layer.self_attn
        config = type(attention.config).from_dict(attention.config.to_dict())
        config._attn_implementation = "sdpa"
        attention.config = config  # `set_attn_implementation` does not reach it
    result = found((model, processor), turns[:1])
    assert verdicts(result) == {**ALL_RIGHT, "later": "not checked"}
    assert "AttentionInterface" in details(result)["later"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget": 1.0}, "keeps everything"),
        ({"nbits": 4}, "nbits=4"),
        ({"tokens": 0}, "tokens=0"),
    ],
)
def test_impossible_options(agent, turns, options, match):
    with pytest.raises(OptionError, match=match):
        found(agent, turns, **options)


def test_mistakes_with_the_model(agent, turns):
    model, processor = agent
    with pytest.raises(OptionError, match="at least one turn"):
        verify(model, processor, [])
    model.train()
    with pytest.raises(OptionError, match=r"model\.eval\(\)"):
        verify(model, processor, turns)
    model.eval()
    with (
        starkv_compile.compiled(model, budget=0.5, inner="eager"),
        pytest.raises(OptionError, match=r"undo\(model\)"),
    ):
        verify(model, processor, turns)


@pytest.mark.slow(ci=True)
def test_a_session_that_drops_nothing(agent, turns):
    with pytest.raises(UnsupportedModel, match="dropped no token"):
        found(agent, turns[:1], tokens=1, budget_tokens=4096)
