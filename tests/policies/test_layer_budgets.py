"""Layers that keep different numbers of tokens: how many, in what total, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache

import starkv_compile
from starkv_compile import CacheError, OptionError, StarKVCache, StarKVConfig
from starkv_compile.kernels.reference.capacity import layer_capacity
from starkv_compile.passes import Pipeline, apply
from starkv_compile.testing import LAYERS, TinyPrompt, generate, tiny_inputs, tiny_model
from tests.support.one_layer import Attention, E, capture


def capacities(length, window, capacity, weights):
    return [layer_capacity(length, window, capacity, weights, i) for i in range(len(weights))]


def pyramid(layers, **options):
    return StarKVConfig(policy="pyramidkv", **options).layer_weights(layers)


def published(length, window, capacity, layers):
    """PyramidKV's budgets as published: integers from the first layer to the last, window added."""
    least = (capacity - window) // 20
    most = 2 * (capacity - window) - least
    if most > length - window:
        most = length - window
        least = 2 * (capacity - window) - most
    step = (most - least) // (layers - 1)
    return [most - layer * step + window for layer in range(layers)]


@pytest.mark.parametrize(("length", "capacity"), [(2800, 280), (2800, 560), (13535, 2707)])
def test_the_pyramid_is_the_published_one_but_for_its_rounding(length, capacity):
    ours, theirs = capacities(length, 8, capacity, pyramid(28)), published(length, 8, capacity, 28)
    assert sum(ours) == 28 * capacity
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 28, "a step's remainder"
    assert abs(ours[0] - theirs[0]) <= 1
    assert sum(theirs) >= sum(ours)


def test_a_pyramid_by_hand():
    # 40 beyond a window of 8, three layers: 78, 40 and 2 of 120.
    assert capacities(1000, 8, 48, pyramid(3)) == [86, 48, 10]
    # Only 60 there: the first keeps all, as far above the mean as the last is below it.
    assert capacities(68, 8, 48, pyramid(3)) == [68, 48, 28]
    assert pyramid(1) == (1,)
    assert pyramid(2, layer_budgets=(1, 3)) == (333, 1000)


def test_shares_by_hand():
    assert capacities(1000, 8, 18, (1, 3)) == [13, 23]
    assert capacities(1000, 8, 18, (5, 5)) == [18, 18]
    assert capacities(10, 8, 18, (1, 3)) == [10, 10], "everything"
    assert capacities(1000, 8, 6, (1, 3)) == [5, 7], "the window shrinks to 4; 2 each are left"


@given(
    length=st.integers(2, 5000),
    window=st.integers(1, 64),
    share=st.floats(0.01, 1.2),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=40),
)
def test_the_total_is_that_of_one_budget_for_all(length, window, share, weights):
    capacity = max(3, int(length * share))
    found = capacities(length, window, capacity, weights)
    assert sum(found) == len(weights) * min(capacity, length)
    assert max(found) <= length
    assert min(found) >= 1
    for (a, heavy), (b, light) in zip(
        zip(found, weights, strict=True), zip(found[1:], weights[1:], strict=True), strict=False
    ):
        assert (heavy - light) * (a - b) >= 0 or abs(a - b) <= 1


class Two(nn.Module):
    """Two layers whose keys and values are returned."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x):
        return (*self.first(x)[1:], *self.second(x)[1:])


@pytest.mark.parametrize("options", [{"layer_budgets": (1, 3)}, {"policy": "pyramidkv"}], ids=str)
def test_one_graph_serves_every_length(options):
    config = StarKVConfig(budget=0.3, **options)
    weights = config.layer_weights(2)
    graph = capture(Two(), torch.randn(2, 40, E), how="export", dynamic=True)
    assert apply(graph, config).rewritten == 2
    for length in (31, 40, 57, 200):
        stored = [t.shape[2] for t in graph(torch.randn(1, length, E))]
        first, second = capacities(length, 8, config.capacity(length), weights)
        assert stored == [first, first, second, second]
        assert first + second == 2 * config.capacity(length)


def test_what_a_graph_cannot_share_out_is_refused():
    config = StarKVConfig(layer_budgets=(1, 3))
    report = Pipeline(config).run(capture(Two(), torch.randn(1, 40, E)), cache="caller", layers=3)
    assert "2 of 3 layers can be compressed in this graph" in report.sites[0].reason
    with pytest.raises(OptionError, match="has 3 values, but 2 layers"):
        apply(capture(Two(), torch.randn(1, 40, E)), StarKVConfig(layer_budgets=(1, 3, 1)))


@pytest.mark.parametrize("wrong", [(), (1, 0), (1, -2.0), "12", 3, (1, "2"), (1, float("nan"))])
def test_impossible_layer_budgets(wrong):
    with pytest.raises(OptionError, match="a number above 0 for each compressed layer"):
        StarKVConfig(layer_budgets=wrong)


@pytest.mark.parametrize("options", [{"layer_budgets": [1, 3]}, {"policy": "pyramidkv"}], ids=str)
def test_no_common_slot_to_decode_into(options):
    with pytest.raises(OptionError, match="leave out decode_tokens"):
        StarKVConfig(decode_tokens=8, **options)


def test_a_model_with_a_pyramid():
    model, inputs = tiny_model("llava"), tiny_inputs("llava")
    whole = model(**inputs, use_cache=True).past_key_values
    starkv_compile.compile(model, policy="pyramidkv", budget=0.4, inner="eager")
    cache = StarKVCache(model.config)
    first = generate(model, inputs, 1, past_key_values=cache).sequences
    seen = inputs["input_ids"].shape[1]
    stored = [layer.stored for layer in cache.compressed_layers]
    assert stored == capacities(seen, 8, seen * 2 // 5, pyramid(LAYERS))
    assert sum(stored) == LAYERS * (seen * 2 // 5)
    assert not starkv_compile.report(model).refusals

    expected = DynamicCache(config=model.config.get_text_config())
    for i, (layer, full) in enumerate(zip(cache.layers, whole.layers, strict=True)):
        slots = layer.kept[..., None].expand(-1, -1, -1, full.keys.shape[-1])
        expected.update(full.keys.gather(2, slots), full.values.gather(2, slots), i)
    ones = torch.ones(1, seen + 1, dtype=torch.int64)
    token, place = first[:, -1:], torch.tensor([[seen]])
    ours = model(
        input_ids=token, position_ids=place, attention_mask=ones, past_key_values=cache
    ).logits
    starkv_compile.undo(model)
    theirs = model(
        input_ids=token,
        position_ids=place,
        past_key_values=expected,
        attention_mask=torch.zeros(1, 1, 1, 1),
    ).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    starkv_compile.compile(model, policy="pyramidkv", budget=0.4, inner="eager")
    ids = torch.cat([first, torch.arange(20, 30)[None]], 1)
    with pytest.raises(CacheError, match="the cache takes one token at a time"):
        model(input_ids=ids[:, -10:], past_key_values=cache)
    with pytest.raises(CacheError, match="different numbers of tokens"):
        cache.keep_newest_frames(1)


@pytest.mark.slow(ci=True)
def test_padding_and_layers_of_different_length_do_not_go_together():
    model = starkv_compile.compile(
        tiny_model("llava"), layer_budgets=(1, 3), budget=0.4, inner="eager"
    )
    inputs = tiny_inputs("llava", TinyPrompt(), TinyPrompt(((4, 4),), 12, seed=3))
    with pytest.warns(UserWarning, match="no single mask could hide the padding in all layers"):
        cache = generate(model, inputs, 2).past_key_values
    assert [layer.get_seq_length() for layer in cache.layers] == [
        inputs["input_ids"].shape[1] + 1
    ] * 2
