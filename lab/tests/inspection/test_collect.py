"""What a page says is kept is what the compiled model keeps, at every budget it offers."""

import pytest
import torch
from starkv_lab.inspection.collect import collect

import starkv_compile
from lab.tests.support.inspection_prompts import tiny_prompt
from starkv_compile import StarKVCache, StarKVConfig, UnsupportedModel
from starkv_compile.cache import layer_bytes
from starkv_compile.policies import ScreenNovelty
from tests.support.crossing import slow

SHARES = (0.5, 0.1)  # at the second the window is clipped


def compressed(prompt, config):
    """The cache of the prompt in the compiled model."""
    starkv_compile.compile(prompt.model, config)
    cache = StarKVCache(prompt.model.config)
    prompt.model.generate(**prompt.inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
    starkv_compile.undo(prompt.model)
    return cache


@pytest.mark.parametrize(
    ("family", "config"),
    [
        slow("qwen2_vl", StarKVConfig()),
        slow("qwen2_vl", StarKVConfig(nbits=4), ci=True),
        slow("qwen3_vl", StarKVConfig(policy="gui_kv"), ci=True),  # a set a head
        slow("qwen2_vl", StarKVConfig(policy="pyramidkv")),  # a budget a layer
        slow("llava", StarKVConfig(policy="tova")),  # a window of its own
    ],
    ids=lambda value: value if isinstance(value, str) else value.policy,
)
def test_kept_sets_and_bytes_are_the_compiled_caches(family, config):
    grids = ((4, 4), (4, 4)) if family == "llava" else ((4, 5), (3, 4))
    prompt = tiny_prompt(family, grids)
    inspection = collect(prompt, config, SHARES)
    assert [budget.share for budget in inspection.budgets] == list(SHARES)
    changes = config.to_options()
    for budget in inspection.budgets:
        cache = compressed(
            prompt, StarKVConfig.from_options({**changes, "budget": budget.share, "inner": "eager"})
        )
        for number, layer in enumerate(cache.compressed_layers):
            kept = layer.kept[0] if layer.kept.dim() == 3 else layer.kept
            heads = [budget.places(number, head) for head in range(budget.ranks.shape[1])]
            assert heads == kept.tolist()
            assert layer.stored == budget.kept[number] < layer.seen
            assert layer_bytes(layer) == inspection.nbytes(budget, number)
        layout = cache.shared.layout
        for name in ("frame", "row", "column"):
            assert torch.equal(getattr(inspection, name), getattr(layout, name)[0])


@pytest.mark.slow
def test_ranks_are_those_of_the_final_score():
    inspection = collect(tiny_prompt("qwen2_vl"), StarKVConfig(), SHARES)
    budget, final = inspection.budgets[0], inspection.axes[-1]
    for layer in range(2):
        ranks, window = budget.ranks[layer, 0], budget.window[layer]
        assert ranks.sort().values.tolist() == list(range(len(ranks)))
        assert ranks[-window:].tolist() == list(range(window))
        scores = final.values[layer][:-window]
        assert torch.equal(scores[ranks[:-window].argsort()], scores.sort(descending=True).values)
        assert final.values[layer][-window:].isnan().all()


@pytest.mark.parametrize(
    "config", [StarKVConfig(policy="starkv"), StarKVConfig.paper()], ids=["subspace", "global"]
)
def test_the_axes_make_up_the_final_score(config):
    """A new axis of the policy fails here until it is in `axes.py`.

    With mutual information from the first step, and a frame of more cells than the 12 x 12 it is
    counted on: else the spatial prior is 1 everywhere.
    """
    changes = {**config.to_options(), "mi_warm_steps": 0, "mi_ramp_steps": 1, "pool": 3}
    prompt = tiny_prompt("qwen2_vl", grids=((4, 5), (20, 20)))
    inspection = collect(prompt, StarKVConfig.from_options(changes), (0.5,))
    values = {axis.name: axis.values for axis in inspection.axes}
    final = values.pop("final")
    product = values.pop("attention") + values.pop("boost")
    assert set(values) == {"spatial", "temporal", "entropy"}
    for name, factor in values.items():
        assert (factor[:, :-8] != 1).any(), name
        product = product * factor
    torch.testing.assert_close(product, final, equal_nan=True)


def test_the_axes_of_novelty_rank_the_tokens_of_screens():
    prompt = tiny_prompt("qwen2_vl", grids=((4, 5), (4, 5)))
    inspection = collect(prompt, StarKVConfig(policy=ScreenNovelty(attention_weight=0.7)), (0.5,))
    names = [axis.name for axis in inspection.axes]
    assert names == ["attention", "space", "time", "text", "final"]
    for layer in range(2):
        of_screens = (inspection.frame >= 0) & ~inspection.axes[-1].values[layer].isnan()
        attention, space, time, text, final = (
            axis.values[layer][of_screens] for axis in inspection.axes
        )
        assert not text.any()
        assert (inspection.axes[3].values[layer][inspection.frame < 0][:2] > 0).all()
        product = space * time * (1 + 0.7 * attention / attention.mean())
        assert torch.equal(product.argsort(), final.argsort())
        assert (space != 1).any()
        assert (time != 1).any()


@pytest.mark.slow
def test_other_policies_have_attention_and_the_final_score_and_leave_the_model_as_it_was():
    prompt = tiny_prompt("qwen2_vl")
    inspection = collect(prompt, StarKVConfig(policy="random"), (0.5,))
    assert [axis.name for axis in inspection.axes] == ["attention", "final"]
    attention = inspection.axes[0].values[:, :-8]
    assert (attention > 0).all()
    assert (attention.sum(1) < 8).all()  # of 8 queries, some of it goes to the window

    assert prompt.model._compiled_call_impl is None
    assert not starkv_compile.undo(prompt.model)
    output = prompt.model(**prompt.inputs)
    assert output.past_key_values.get_seq_length() == prompt.inputs["input_ids"].shape[1]


def test_a_model_that_cannot_be_compressed_says_why():
    prompt = tiny_prompt("qwen2_vl")
    prompt.model.train()
    with pytest.warns(UserWarning, match="training mode"), pytest.raises(UnsupportedModel) as said:
        collect(prompt, StarKVConfig(), (0.5,))
    assert "0 of 2 layers can be compressed (" in str(said.value)
    assert "model.eval()" in str(said.value)
