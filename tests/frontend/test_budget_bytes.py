"""`budget_bytes`: the whole cache, in bytes that its storages really hold."""

import pytest
import torch
from starkv_lab.matrix.prompts import make_prompt
from starkv_lab.matrix.tiny import tiny_model as tiny_family
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache

import starkv_compile
from starkv_compile import OptionError, StarKVCache, StarKVConfig
from starkv_compile.passes import apply
from starkv_compile.testing import LAYERS, TinyPrompt, generate, tiny_inputs, tiny_model
from tests.support.crossing import slow

TOKEN = LAYERS * 2 * 2 * 16 * 4  # layers, keys and values, KV heads, head dim, float32
BUDGET = 25 * TOKEN + TOKEN // 2


def assert_spent(cache, budget, token):
    """Not a byte above, and no room for one more token."""
    stored = sum(
        t.untyped_storage().nbytes() for x in cache.compressed_layers for t in (x.keys, x.values)
    )
    assert budget - token < stored <= budget


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
@pytest.mark.parametrize("way", ["compile", "torch.compile", "model.compile"])
def test_what_is_stored_is_what_was_allowed(family, way):
    model, options = tiny_model(family), {"budget_bytes": BUDGET, "inner": "eager"}
    called = model
    if way == "compile":
        starkv_compile.compile(model, **options)
    elif way == "torch.compile":
        called = torch.compile(model, backend="starkv", options=options)
    else:
        model.compile(backend="starkv", options=options)
    cache = generate(called, tiny_inputs(family), 1).past_key_values
    assert_spent(cache, BUDGET, TOKEN)
    told = str(starkv_compile.report(model))
    assert f"{BUDGET:,d} bytes; a token takes {TOKEN:,d}" in told


@pytest.mark.slow(ci=True)
def test_rows_of_a_batch_share_it():
    """Also where their number is a symbol of a graph that was compiled for another one."""
    model = starkv_compile.compile(tiny_model("qwen3_vl"), budget_bytes=3 * BUDGET, inner="eager")
    for rows in (1, 2, 3):
        inputs = tiny_inputs("qwen3_vl", *[TinyPrompt(((4, 4),), 60, seed=i) for i in range(rows)])
        cache = generate(model, inputs, 1).past_key_values
        assert len(cache.layers[0].keys) == rows
        assert_spent(cache, 3 * BUDGET, rows * TOKEN)


@pytest.mark.parametrize("room", [slow(None), slow(6, ci=True)])
def test_a_session_stays_under_it(room):
    """After each prompt; with room to decode in, at any time."""
    model = starkv_compile.compile(
        tiny_model("llava"), budget_bytes=BUDGET, decode_tokens=room, inner="eager"
    )
    cache, ids = StarKVCache(model.config), torch.arange(10, 60)[None]
    for words in (20, 12, 1):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        out = generate(model, inputs, 5 if room else 1, past_key_values=cache)
        assert_spent(cache, BUDGET, TOKEN)
        assert cache.layers[0].keys.shape[2] == 25
        ids = torch.cat([out.sequences, torch.arange(20, 20 + words)[None]], 1)


@pytest.mark.slow
def test_latents_count_as_what_they_are():
    """Multi-head latent attention stores latents, whose keys and values differ in width."""
    model = tiny_family("deepseek_v3")
    arguments = make_prompt("deepseek_v3", model).arguments
    text = model.config
    token = text.num_hidden_layers * (text.kv_lora_rank + text.qk_rope_head_dim) * 4
    starkv_compile.compile(model, budget_bytes=9 * token + 1, inner="eager")
    assert_spent(generate(model, arguments, 1).past_key_values, 9 * token + 1, token)


def in_two_graphs():
    """A compiled model whose first layer ends in a graph break."""
    model = tiny_model("llava")
    mlp = model.model.language_model.layers[0].mlp
    plain = mlp.forward

    def broken(x):
        torch._dynamo.graph_break()
        return plain(x)

    mlp.forward = broken
    return starkv_compile.compile(model, budget_bytes=BUDGET, inner="eager")


@pytest.mark.slow
def test_layers_in_other_graphs_count():
    model = in_two_graphs()
    assert_spent(generate(model, tiny_inputs("llava"), 1).past_key_values, BUDGET, TOKEN)
    assert len(starkv_compile.report(model).prompt_graphs) == 2


@pytest.mark.slow
def test_a_cache_made_without_a_configuration_learns_the_number_of_layers():
    cache = DynamicCache()
    generate(in_two_graphs(), tiny_inputs("llava"), 1, past_key_values=cache)
    assert_spent(cache, BUDGET, TOKEN)


class TwoLayers(nn.Module):
    """Attentions of different width, whose keys and values the graph returns."""

    def forward(self, x):
        stored = []
        for dim in (16, 8):
            q, k, v = (
                x[..., i * dim : i * dim + 4 * dim].unflatten(-1, (4, dim)) for i in range(3)
            )
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            stored += [F.scaled_dot_product_attention(q, k, v, is_causal=True), k, v]
        return stored


def test_a_graph_of_ones_own():
    x = torch.randn(2, 40, 128)
    program = torch.export.export(
        TwoLayers(), (x,), dynamic_shapes={"x": {1: torch.export.Dim.AUTO}}
    )
    graph = program.module()
    token = 2 * 2 * 4 * (16 + 8) * 4
    apply(graph, StarKVConfig(budget_bytes=12 * token + 5))
    _, *first, _, third, fourth = graph(x)
    assert {t.shape[2] for t in (*first, third, fourth)} == {12}


@pytest.mark.slow(ci=True)
def test_too_small_a_budget_names_the_least():
    model = starkv_compile.compile(tiny_model("llava"), budget_bytes=TOKEN, inner="eager")
    with pytest.raises(OptionError, match=f"takes {TOKEN} bytes .* give at least {2 * TOKEN}"):
        generate(model, tiny_inputs("llava"), 1)
    model = starkv_compile.compile(
        tiny_model("llava"), budget_bytes=5 * TOKEN, decode_tokens=4, inner="eager"
    )
    with pytest.raises(OptionError, match=f"4 slots for decoding; give at least {6 * TOKEN}"):
        generate(model, tiny_inputs("llava"), 1)


@pytest.mark.parametrize("value", ["1GB", 1e9, 0, True], ids=repr)
def test_only_a_whole_number_of_bytes(value):
    with pytest.raises(OptionError, match=r"budget_bytes=.*2 \* 10\*\*9 for 2 GB"):
        StarKVConfig(budget_bytes=value)


@pytest.mark.parametrize(
    "given",
    [
        {"budget_bytes": 10**6, "budget": 0.5},
        {"budget_bytes": 10**6, "budget": 1.0},
        {"budget_bytes": 10**6, "budget_tokens": 64},
        {"budget_tokens": 64, "budget": 0.5},
    ],
)
def test_one_budget_at_a_time(given):
    with pytest.raises(OptionError, match=f"has one budget; leave out {[*given][1]}"):
        StarKVConfig(**given)


def test_without_a_model_bytes_are_no_tokens():
    with pytest.raises(OptionError, match="use budget_tokens"):
        StarKVConfig(budget_bytes=10**6).capacity(100)
