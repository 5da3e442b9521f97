"""Every way in, on tiny models of real architectures: looked at inside graph and cache."""

import pytest
import torch

import starkv_compile
from starkv_compile import StarKVCache, StarKVConfig
from starkv_compile.testing import FAMILIES, LAYERS, TinyPrompt, generate, tiny_inputs, tiny_model
from tests.support.crossing import crossed, first_in_ci, first_only, slow

WAYS = ("torch.compile", "model.compile", "starkv_compile.compile")


def enter(way, model, **options):
    if way == "torch.compile":
        return torch.compile(model, backend="starkv", options=options)
    if way == "model.compile":
        model.compile(backend="starkv", options=options)
        return model
    return starkv_compile.compile(model, **options)


def assert_compressed(report, cache, config, seen):
    """All layers rewritten, once a prompt graph, and the cache holds what it says."""
    assert not report.refusals
    assert sum(graph.rewritten for graph in report.prompt_graphs) % LAYERS == 0
    for graph in report.prompt_graphs:
        assert graph.found == graph.rewritten == LAYERS, str(report)
    assert len(cache.compressed_layers) == LAYERS
    for layer in cache.compressed_layers:
        capacity = config.capacity(seen)
        assert layer.kept.shape[1] == capacity
        assert (layer.kept[:, 1:] > layer.kept[:, :-1]).all()
        window = range(seen - config.window, seen)
        assert layer.kept[0, -config.window :].tolist() == list(window)
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
        assert layer.stored == capacity + layer.seen - seen


@pytest.mark.parametrize(("family", "way"), crossed(FAMILIES, WAYS))
def test_compresses(family, way):
    model, inputs = tiny_model(family), tiny_inputs(family)
    seen = inputs["input_ids"].shape[1]
    full = generate(model, inputs)
    compiled = enter(way, model, budget=0.3, inner="eager")
    out = generate(compiled, inputs)
    cache, report = out.past_key_values, starkv_compile.report(compiled)
    assert isinstance(cache, StarKVCache)
    assert cache.get_seq_length() == full.past_key_values.get_seq_length()
    assert_compressed(report, cache, StarKVConfig(budget=0.3), seen)
    assert cache.nbytes < 0.4 * sum(
        t.nbytes for layer in full.past_key_values.layers for t in (layer.keys, layer.values)
    )
    # The first new token is the full cache's: attention of the prompt itself reads everything.
    assert torch.equal(out.logits[0], full.logits[0])
    # From 5.23 on `generate` encodes images first and passes no grid on.
    assert report.layout in (("square",) if family == "llava" else ("grid", "positions"))


@pytest.mark.parametrize(("family", "way"), crossed(FAMILIES, WAYS))
def test_pixels_given_to_the_model_itself(family, way):
    """Without `generate`, which may encode images first: the tower runs inside the call."""
    model, inputs = tiny_model(family), tiny_inputs(family)
    compiled = enter(way, model, budget=0.3, inner="eager")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        logits = model(**inputs).logits
        cache = compiled(**inputs).past_key_values
    assert_compressed(starkv_compile.report(compiled), cache, StarKVConfig(budget=0.3), 68)
    assert not torch._dynamo.utils.counters["graph_break"]
    starkv_compile.undo(compiled)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("way", first_in_ci(WAYS))
def test_a_part_of_the_model_called_by_itself(way):
    """Whichever module `generate` calls, and by whichever method, the cache is prepared once."""
    model = tiny_model("llava")
    enter(way, model, budget=0.3, inner="eager")
    ids = tiny_inputs("llava", TinyPrompt((), 40))["input_ids"]
    for part in (model, model.model, model.get_decoder()):
        for call in (part, part.forward):
            with torch.no_grad():
                cache = call(input_ids=ids).past_key_values
            assert isinstance(cache, StarKVCache)
            assert [layer.stored for layer in cache.layers] == [12, 12]
            assert cache.get_seq_length() == ids.shape[1]
        assert starkv_compile.report(part) is starkv_compile.report(model)
    starkv_compile.undo(model)
    assert "forward" not in vars(model.get_decoder())
    assert not isinstance(model.get_decoder()(input_ids=ids).past_key_values, StarKVCache)


@pytest.mark.parametrize(
    ("way", "inner"),
    [
        *(slow(way, "eager", ci=True) for way in WAYS[:2]),
        (WAYS[2], "eager"),
        slow(WAYS[0], "aot_eager", ci=True),
        *(slow(way, "aot_eager") for way in WAYS[1:]),
        *(slow(way, "inductor") for way in WAYS if way != "model.compile"),  # as torch.compile
    ],
)
def test_budget_one_is_bit_identical(way, inner):
    """Against the same decoder compiled by the inner backend, without the pass."""
    family = "qwen2_5_vl"
    inputs = tiny_inputs(family)
    size = {"num_hidden_layers": 1} if inner == "inductor" else {}  # compiles sooner
    plain = tiny_model(family, **size)
    dynamic = True if way == "starkv_compile.compile" else None
    plain.get_decoder().compile(backend=inner, dynamic=dynamic)
    expected = generate(plain, inputs)
    torch._dynamo.reset()
    ours = generate(enter(way, tiny_model(family, **size), budget=1.0, inner=inner), inputs)
    assert torch.equal(ours.sequences, expected.sequences)
    for left, right in zip(ours.logits, expected.logits, strict=True):
        assert torch.equal(left, right)
    assert not isinstance(ours.past_key_values, StarKVCache)


@pytest.mark.parametrize("family", first_only(FAMILIES))
def test_kept_rows_equal_the_originals(family):
    model, inputs = tiny_model(family), tiny_inputs(family)
    full = generate(model, inputs, tokens=1).past_key_values
    compiled = starkv_compile.compile(model, budget=0.3, inner="eager")
    cache = generate(compiled, inputs, tokens=1).past_key_values
    # The first layer's keys do not depend on what was dropped: equal bit for bit.
    for ours, theirs in zip(cache.layers, full.layers, strict=True):
        for kind in ("keys", "values"):
            source = getattr(theirs, kind)[0][:, ours.kept[0]]
            assert torch.equal(getattr(ours, kind)[0], source)


@pytest.mark.parametrize("inner", ["eager", slow("inductor")])
def test_no_recompile_after_the_second_length(inner):
    model = starkv_compile.compile(tiny_model("qwen3_vl"), budget=0.3, inner=inner)
    generate(model, tiny_inputs("qwen3_vl"), tokens=6)
    generate(model, tiny_inputs("qwen3_vl", TinyPrompt(text=41, seed=1)), tokens=6)
    report = starkv_compile.report(model)
    graphs = len(report.graphs)
    assert graphs == 2, "one for prompts, one for decoding"
    with torch._dynamo.config.patch(error_on_recompile=True):
        for grids, text in ((((4, 4),), 60), (((3, 5), (4, 4), (2, 6)), 35)):
            generate(model, tiny_inputs("qwen3_vl", TinyPrompt(grids, text)), tokens=9)
    assert len(report.graphs) == graphs


@pytest.mark.parametrize("family", first_in_ci(FAMILIES))
def test_left_padded_batch(family):
    """Row i of a batch equals row i alone, at the same number of tokens kept."""
    prompts = TinyPrompt(), TinyPrompt(grids=((4, 4),), text=16, seed=3)
    model = starkv_compile.compile(tiny_model(family), budget_tokens=16, inner="eager")
    inputs = tiny_inputs(family, *prompts)
    both = generate(model, inputs)
    kept = [layer.kept for layer in both.past_key_values.layers]
    images = {"llava": (2, 1)}.get(family, (128, 64))
    start = 0
    for i, prompt in enumerate(prompts):
        alone = tiny_inputs(family, prompt)
        alone["pixel_values"] = inputs["pixel_values"][start : start + images[i]]
        start += images[i]
        out = generate(model, alone)
        padding = inputs["input_ids"].shape[1] - alone["input_ids"].shape[1]
        for layer, both_kept in zip(out.past_key_values.layers, kept, strict=True):
            assert torch.equal(layer.kept[0] + padding, both_kept[i])
        assert torch.equal(out.sequences[0, -4:], both.sequences[i, -4:])
        for left, right in zip(out.logits, both.logits, strict=True):
            torch.testing.assert_close(left[0], right[i], rtol=1e-4, atol=1e-5)


@pytest.mark.slow(ci=True)
def test_padding_kept_where_real_tokens_run_out_is_zero_and_masked():
    family = "qwen2_5_vl"
    prompts = TinyPrompt(grids=((4, 4),), text=40), TinyPrompt(grids=(), text=10, seed=2)
    model = starkv_compile.compile(tiny_model(family), budget=0.5, inner="eager")
    inputs = tiny_inputs(family, *prompts)
    out = generate(model, inputs)
    alone = generate(tiny_model(family), tiny_inputs(family, prompts[1]))
    layer = out.past_key_values.layers[0]
    padding = int((inputs["attention_mask"][1] == 0).sum())
    is_padding = layer.kept[1] < padding
    assert is_padding.any()
    assert (layer.keys[1][:, : layer.kept.shape[1]][:, is_padding] == 0).all()
    # All 12 real tokens fit the budget, so this row is as if nothing had been dropped.
    assert torch.equal(out.sequences[1, -4:], alone.sequences[0, -4:])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("image", 3),
        slow("text", 3, ci=True),
        *(slow(kind, text) for kind in ("image", "text") for text in (1, 7, 8, 9)),
    ],
)
def test_short_prompts(kind, text):
    family = "qwen2_5_vl"
    grids = ((2, 2),) if kind == "image" else ()
    inputs = tiny_inputs(family, TinyPrompt(grids, text))
    seen = inputs["input_ids"].shape[1]
    model = starkv_compile.compile(tiny_model(family), budget=0.2, inner="eager")
    out = generate(model, inputs)
    capacity = StarKVConfig(budget=0.2).capacity(seen)
    kept = out.past_key_values.layers[0].kept
    assert kept.shape[1] == max(2, capacity)
    assert kept[0, -1] == seen - 1
    assert out.sequences.shape[1] == seen + 4


def test_text_only_prompt():
    family = "qwen2_5_vl"
    model = starkv_compile.compile(tiny_model(family), budget=0.2, inner="eager")
    out = generate(model, tiny_inputs(family, TinyPrompt((), 60)))
    assert starkv_compile.report(model).layout == "text"
    assert out.past_key_values.layers[0].kept.shape[1] == 12
    assert out.past_key_values.layers[0].state[1].tolist() == [0], "no frame was profiled"


def test_use_cache_false_is_left_alone_and_said_once():
    family = "qwen2_5_vl"
    inputs = tiny_inputs(family)
    expected = generate(tiny_model(family), inputs, use_cache=False)
    model = starkv_compile.compile(tiny_model(family), budget=0.2, inner="eager")
    with pytest.warns(UserWarning, match="use_cache=False") as caught:
        out = generate(model, inputs, use_cache=False)
    assert sum("starkv left" in str(w.message) for w in caught) == 1
    assert torch.equal(out.sequences, expected.sequences)


def test_training_mode_is_left_alone():
    model = starkv_compile.compile(tiny_model("llava").train(), budget=0.2, inner="eager")
    with pytest.warns(UserWarning, match=r"call model\.eval"):
        model(**tiny_inputs("llava"))


def test_right_padding_is_refused_by_name():
    family = "qwen2_5_vl"
    inputs = tiny_inputs(family)
    inputs["attention_mask"][0, -2:] = 0
    model = starkv_compile.compile(tiny_model(family), budget=0.2, inner="eager")
    with pytest.raises(starkv_compile.CacheError, match="padding_side='left'"):
        generate(model, inputs)


@pytest.mark.parametrize("kind", [slow("static", ci=True), "filled"])
def test_caches_that_cannot_be_shortened_are_left_whole(kind):
    from transformers import DynamicCache, StaticCache

    family = "qwen2_5_vl"
    inputs, model = tiny_inputs(family), tiny_model(family)
    text = model.config.get_text_config()
    expected = generate(model, inputs)
    compiled = starkv_compile.compile(model, budget=0.2, inner="eager")
    if kind == "static":
        cache = StaticCache(config=text, max_cache_len=128)
        with pytest.warns(UserWarning, match=r"StaticCache.*StarKVCache\(model\.config\)"):
            out = generate(compiled, inputs, past_key_values=cache)
        assert torch.equal(out.sequences, expected.sequences)
        return
    starkv_compile.undo(compiled)
    cache = generate(model, tiny_inputs(family, TinyPrompt((), 9)), tokens=1).past_key_values
    assert type(cache) is DynamicCache
    compiled = starkv_compile.compile(model, budget=0.2, inner="eager")
    ids = torch.cat([torch.zeros(1, 11, dtype=torch.long), torch.full((1, 9), 7)], dim=1)
    with pytest.warns(UserWarning, match="already holds tokens stored without starkv"):
        compiled.generate(input_ids=ids, past_key_values=cache, max_new_tokens=2)
    assert cache.layers[0].keys.shape[-2] >= 20


@pytest.mark.slow(ci=True)
def test_undo_gives_the_model_back():
    family = "qwen2_5_vl"
    inputs, model = tiny_inputs(family), tiny_model(family)
    expected = generate(model, inputs)
    for way in WAYS:
        compiled = enter(way, model, budget=0.2, inner="eager")
        generate(compiled, inputs)
        assert starkv_compile.undo(compiled)
        assert not starkv_compile.undo(compiled)
        assert not model._forward_pre_hooks
        assert model._compiled_call_impl is None
        out = generate(model, inputs)
        assert torch.equal(out.sequences, expected.sequences)
        assert not isinstance(out.past_key_values, StarKVCache)


def test_report_before_compile_says_what_to_do():
    with pytest.raises(starkv_compile.UnsupportedModel, match="was not compiled with starkv"):
        starkv_compile.report(tiny_model("llava"))
    with pytest.raises(
        starkv_compile.UnsupportedModel, match=r"no language model with get_decoder"
    ):
        starkv_compile.compile(torch.nn.Linear(2, 2))


def test_a_decoder_on_its_own():
    decoder = tiny_model("llava").get_decoder()
    full = decoder(input_ids=tiny_inputs("llava", TinyPrompt((), 40))["input_ids"])
    starkv_compile.compile(decoder, budget=0.3, inner="eager")
    out = decoder(input_ids=tiny_inputs("llava", TinyPrompt((), 40))["input_ids"])
    assert torch.equal(out.last_hidden_state, full.last_hidden_state)
    assert [layer.stored for layer in out.past_key_values.layers] == [12] * LAYERS
    starkv_compile.undo(decoder)
    assert decoder._compiled_call_impl is None


def test_sessions_do_not_leak_into_each_other():
    family = "qwen2_5_vl"
    model = starkv_compile.compile(tiny_model(family), budget=0.3, inner="eager")
    alone = generate(model, tiny_inputs(family, TinyPrompt(seed=5)))
    generate(model, tiny_inputs(family, TinyPrompt(grids=((3, 7),), seed=6)))
    again = generate(model, tiny_inputs(family, TinyPrompt(seed=5)))
    assert torch.equal(alone.sequences, again.sequences)
    for left, right in zip(alone.past_key_values.layers, again.past_key_values.layers, strict=True):
        assert torch.equal(left.kept, right.kept)
        for a, b in zip(left.state, right.state, strict=True):
            assert torch.equal(a, b)
