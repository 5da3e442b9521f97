"""Policies in which each KV head keeps a set of its own, against sets worked out by hand."""

import pytest
import torch

from starkv_compile import StarKVConfig, UnsupportedModel
from starkv_compile.policies import measure_layer_budgets
from starkv_compile.policies.layer_density import density
from starkv_compile.testing import LAYERS, tiny_inputs, tiny_model
from tests.support.policy_cases import attended, frames, kept, text


def test_snapkv_cuts_for_each_kv_head():
    one, other = [9.0, 1, 1, 1, 6, 1, 1], [1.0, 9, 1, 1, 6, 1, 1]
    assert kept("snapkv", *attended(one, other), 2) == [[0, 6], [1, 6]]
    assert kept("snapkv", *attended(one, other), 3) == [[0, 4, 6], [1, 4, 6]]
    assert kept("snapkv_mean", *attended(one, other), 2) == [4, 6]


def test_snapkv_averages_over_the_query_heads_of_a_kv_head():
    query, key = torch.zeros(1, 4, 5, 4), torch.zeros(1, 2, 5, 4)
    for head, axis in enumerate((1, 2, 1, 3)):
        query[0, head, :, axis] = 1.0
    key[0, :, 0, 1], key[0, :, 1, 2], key[0, :, 2, 3] = 2.0, 3.0, 4.0
    # One query head of each looks at token 0, the other at token 1 in one and at 2 in the other.
    assert kept("snapkv", query, key, 2) == [[1, 4], [2, 4]]
    assert kept("snapkv", query, key, 3) == [[0, 1, 4], [0, 2, 4]]


def axes(*each):
    """Keys [1, 1, len(each), 8] along the named axes, and queries that see all of them alike."""
    key = torch.zeros(1, 1, len(each), 8)
    for place, axis in enumerate(each):
        key[0, 0, place, axis] = 1.0
    return torch.zeros_like(key), key


def test_mixkv_weighs_diversity_by_the_head_s_redundancy():
    value = torch.ones(1, 1, 5, 8)
    value[0, 0, 1] = 2.0  # the largest norm
    # Three of the six pairs of keys before the window are alike: the redundancy is 1/2. With a the
    # attention to each, importance is a, 5 a, a, a; diversity gives token 3 the whole 8 a.
    repeated = axes(1, 1, 1, 2, 3)
    assert kept("mixkv", *repeated, 2, value=value) == [[3, 4]]
    assert kept("mixkv", *repeated, 3, value=value) == [[1, 3, 4]]
    # No two are alike: importance alone counts.
    assert kept("mixkv", *axes(1, 2, 3, 4, 5), 2, value=value) == [[1, 4]]
    # All are alike: none is more diverse than another, so that the first is kept.
    assert kept("mixkv", *axes(1, 1, 1, 1, 5), 2, value=value) == [[0, 4]]


def test_mixkv_drops_what_is_no_number_first():
    query, key = axes(1, 1, 1, 2, 3)
    key[0, 0, 3] = torch.nan
    assert kept("mixkv", query, key, 4) == [[0, 1, 2, 4]]


def screens(*older, current=(0, 1)):
    """One head of dim 8, so of a subspace of 2; frame 0 at 1 to 4, frame 1 at 6 and 7.

    older: an axis for each token of frame 0. current: those of frame 1. Attention is even.
    """
    key = torch.zeros(1, 1, 10, 8)
    for place, axis in zip((1, 2, 3, 4, 6, 7), (*older, *current), strict=True):
        key[0, 0, place, axis] = 1.0
    return torch.zeros_like(key), key, frames(10, (1, 5), (6, 8))


def test_gui_kv_drops_what_the_current_frame_spans():
    query, key, layout = screens(1, 5, 0, 6)
    # Tokens 1 and 3 lie in the plane of the current frame; of four older ones half are dropped.
    assert kept("gui_kv", query, key, 5, layout) == [[0, 2, 4, 5, 9]]
    assert kept("snapkv", query, key, 5, layout) == [[0, 1, 2, 3, 9]]
    # Of four, 3 tenths are one: the first of two that are equal.
    assert kept("gui_kv", query, key, 7, layout) == [[0, 2, 3, 4, 5, 6, 9]]


def test_gui_kv_spans_the_first_tokens_only():
    query, key, layout = screens(1, 5, 0, 6, current=(0, 5))
    assert kept("gui_kv", query, key, 5, layout) == [[0, 1, 4, 5, 9]]
    query, key, layout = screens(1, 5, 0, 6, current=(0, 0))
    # A second token equal to the first adds no direction: only token 3 is spanned; of the three
    # that are equally far the first goes.
    assert kept("gui_kv", query, key, 5, layout) == [[0, 2, 4, 5, 9]]
    assert kept("gui_kv", query, key, 7, layout) == [[0, 1, 2, 4, 5, 6, 9]]


def test_gui_kv_boosts_the_current_frame_in_each_head():
    query, key, layout = screens(1, 5, 0, 6)
    hidden = torch.ones(1, 10, 3)
    hidden[0, 7] = 4.0
    assert kept("gui_kv", query, key, 2, layout, hidden=hidden) == [[7, 9]]
    assert kept("gui_kv", query, key, 3, layout, hidden=hidden) == [[6, 7, 9]]


def test_vl_cache_asks_the_queries_after_the_last_image():
    """A frame at 2 to 5, then text; what the frame's own queries see does not count."""
    key, query = torch.zeros(1, 2, 10, 4), torch.zeros(1, 2, 10, 4)
    query[0, :, :6, 1], query[0, :, 6:, 0] = 1.0, 1.0
    key[0, :, 0, 1] = 9.0  # seen by the frame alone
    key[0, 0, 3, 0], key[0, 1, 4, 0] = 2.0, 2.0
    layout = frames(10, (2, 6))
    assert kept("vl_cache", query, key, 5, layout) == [[3, 6, 7, 8, 9], [4, 6, 7, 8, 9]]
    assert kept("vl_cache", query, key, 3, layout) == [[7, 8, 9], [7, 8, 9]], "newest first"
    longer = [torch.cat([t, t[:, :, :1]], 2) for t in (query, key)]
    assert kept("vl_cache", *longer, 2, frames(11, (2, 6))) == [[9, 10], [9, 10]]
    # A pool of three spreads a peak of 7.4 over its neighbours, which then tie.
    assert kept("vl_cache", query, key, 6, layout, pool=3)[0] == [2, 3, 6, 7, 8, 9]
    everything = torch.ones(1, 1, 10, 10, dtype=torch.bool).tril()
    for mask in (everything, torch.zeros(1, 1, 10, 10).masked_fill(~everything, -1e9)):
        found = kept("vl_cache", query, key, 5, layout, mask=mask)
        assert found == [[3, 6, 7, 8, 9], [4, 6, 7, 8, 9]]


def test_vl_cache_without_frames_or_without_text_after_them_asks_the_window():
    query, key = attended([1.0, 1, 1, 9, 1, 1, 5, 1])
    query[0, 0, :6, 1], key[0, 0, 4, 1] = 9.0, 9.0  # what all but the last two look at
    for layout in (text(8), frames(8, (2, 8))):
        assert kept("vl_cache", query, key, 4, layout, window=2) == [[0, 3, 6, 7]]
        # The last three: the first of them looks at token 4.
        assert kept("vl_cache", query, key, 5, layout, window=3) == [[3, 4, 5, 6, 7]]


def test_density_counts_what_is_not_a_hundredth_of_the_largest():
    weights = torch.tensor([[0.5, 0.4, 0.004, 0.0], [0.5, 0.006, 0.2, 0.1]])[None, None]
    # Of the three that the first query sees one is sparse, of the second's four none.
    assert density(weights) == pytest.approx(6 / 7)


def test_budgets_measured_on_a_model():
    model, inputs = tiny_model("qwen2_5_vl"), tiny_inputs("qwen2_5_vl")
    form = model.config.get_text_config()._attn_implementation
    budgets = measure_layer_budgets(model, inputs)
    assert len(budgets) == LAYERS
    assert all(0 < budget <= 1 for budget in budgets)
    assert model.config.get_text_config()._attn_implementation == form
    with torch.no_grad():  # the first layer told to look at one token only
        attention = model.get_decoder().layers[0].self_attn
        attention.q_proj.weight.mul_(40.0)
        attention.k_proj.weight.mul_(40.0)
    assert measure_layer_budgets(model, inputs)[0] < 0.5 * budgets[0]
    StarKVConfig(policy="vl_cache", layer_budgets=budgets)
    ids = inputs["input_ids"]
    cut = int((ids[0] == model.config.image_token_id).nonzero().amax()) + 1
    short = {k: v[:, :cut] if v.shape[-1] == ids.shape[1] else v for k, v in inputs.items()}
    with pytest.raises(UnsupportedModel, match="ends in an image"):
        measure_layer_budgets(model, short)
