"""`decode_tokens`: decoding in buffers that stay where they are, equal to a cache that grows."""

import contextlib

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import starkv_compile
from starkv_compile import StarKVCache
from starkv_compile.frontend import backend
from starkv_compile.testing import LAYERS, TinyPrompt, generate, tiny_inputs, tiny_model
from tests.support.crossing import slow

FAMILY, BUDGET, TOKENS, ROOM = "qwen3_vl", 0.3, 9, 4
PADDED = (TinyPrompt(), TinyPrompt(((4, 4),), 16, seed=3))


def compiled(family=FAMILY, room=ROOM, model=None, layers=LAYERS, **options):
    model = tiny_model(family, num_hidden_layers=layers) if model is None else model
    options = {"budget": BUDGET, "inner": "eager", "decode_tokens": room, **options}
    return starkv_compile.compile(model, **options)


@pytest.fixture(scope="module")
def grown():
    """What a cache that grows gives."""
    out = generate(compiled(room=None), tiny_inputs(FAMILY), TOKENS)
    torch._dynamo.reset()
    return out


no_mask_without_padding = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="generate passes a mask that grows, which is one more length in the graph",
)


def assert_same(ours, theirs):
    """The same products summed over more keys, the rest of them masked: equal up to rounding."""
    assert torch.equal(ours.sequences, theirs.sequences)
    for left, right in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def watched(model, inputs):
    """`generate`, and what each call left: addresses, slots, and graphs compiled so far."""
    config = getattr(model, "_orig_mod", model).config
    cache, calls = StarKVCache(config), []

    def note(ids, logits):
        layer = cache.layers[0]
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        calls.append((layer.keys.data_ptr(), layer.values.data_ptr(), layer.keys.shape[2], graphs))
        return logits

    out = generate(model, inputs, TOKENS, past_key_values=cache, logits_processor=[note])
    return out, calls


@pytest.mark.parametrize("family", [slow("qwen3_vl", ci=True), slow("llava")])
def test_no_address_no_shape_and_no_graph_changes(family):
    inputs = tiny_inputs(family)
    expected = generate(compiled(family, None), inputs, TOKENS)
    out, calls = watched(compiled(family, 16), inputs)
    assert_same(out, expected)
    assert len(calls) == TOKENS
    assert len(set(calls[1:])) == 1
    layer = out.past_key_values.layers[0]
    assert layer.keys.shape[2] == layer.kept.shape[1] + 16
    assert layer.stored == layer.kept.shape[1] + TOKENS - 1
    assert out.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


@pytest.mark.slow(ci=True)
@no_mask_without_padding
def test_a_full_buffer_is_replaced_by_a_larger_one(grown):
    out, calls = watched(compiled(room=3), tiny_inputs(FAMILY))
    assert_same(out, grown)
    kept = out.past_key_values.layers[0].kept.shape[1]
    assert [slots - kept for _, _, slots, _ in calls] == [0, 3, 3, 3, 6, 6, 6, 9, 9]
    assert len({graphs for _, _, _, graphs in calls[1:]}) == 1, "its length is a symbol"


@pytest.mark.parametrize("way", ["torch.compile", "model.compile"])
def test_every_way_in(way, grown):
    model = tiny_model(FAMILY)
    options = {"budget": BUDGET, "inner": "eager", "decode_tokens": 16}
    if way == "model.compile":
        model.compile(backend="starkv", options=options)
    else:
        model = torch.compile(model, backend="starkv", options=options)
    out, calls = watched(model, tiny_inputs(FAMILY))
    assert_same(out, grown)
    assert len(set(calls[1:])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["aot_eager", slow("inductor")])
def test_writing_in_place_is_the_same_compiled(inner):
    """Of each compiler: the buffers' contents as well, since a lost write shows there first."""
    inputs, policy = tiny_inputs(FAMILY), "snapkv_mean"  # compiles soon
    expected = generate(compiled(policy=policy), inputs, TOKENS)
    torch._dynamo.reset()
    out = generate(compiled(inner=inner, policy=policy), inputs, TOKENS)
    assert_same(out, expected)
    for ours, theirs in zip(
        out.past_key_values.layers, expected.past_key_values.layers, strict=True
    ):
        assert ours.filled == theirs.filled
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "beams"), [("eager", 1), ("sdpa", 3)])
def test_batches_padded_on_the_left(attention, beams):
    def answer(room):
        torch._dynamo.reset()
        model = tiny_model(FAMILY)
        model.model.language_model.set_attn_implementation(attention)
        inputs = tiny_inputs(FAMILY, *PADDED)
        return generate(compiled(room=room, model=model), inputs, TOKENS, num_beams=beams)

    assert_same(answer(ROOM), answer(None))


@pytest.mark.slow(ci=True)
def test_everything_kept():
    """At a budget of 100 % too, against the library's own cache."""
    inputs = tiny_inputs(FAMILY)
    expected = generate(tiny_model(FAMILY), inputs, TOKENS)
    out = generate(compiled(budget=1.0), inputs, TOKENS)
    assert_same(out, expected)
    assert out.past_key_values.layers[0].filled == out.past_key_values.get_seq_length()


@pytest.mark.slow
def test_a_later_turn_takes_the_tokens_out_and_makes_new_buffers():
    def turns(room):
        torch._dynamo.reset()
        model, results = compiled(room=room, layers=1), []
        cache, ids = StarKVCache(model.config), tiny_inputs(FAMILY, TinyPrompt((), 40))["input_ids"]
        for words in (20, 1):
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            results.append(generate(model, inputs, 6, past_key_values=cache))
            ids = torch.cat([results[-1].sequences, torch.arange(20, 20 + words)[None]], 1)
        return results, cache

    ours, theirs = turns(ROOM), turns(None)
    for left, right in zip(ours[0], theirs[0], strict=True):
        assert_same(left, right)
    for left, right in zip(ours[1].layers, theirs[1].layers, strict=True):
        assert torch.equal(left.kept, right.kept)
        assert (left.stored, left.seen) == (right.stored, right.seen)
        left.settle()
        torch.testing.assert_close(left.keys, right.keys)


@pytest.mark.slow(ci=True)
@no_mask_without_padding
def test_nothing_in_the_graph_waits_for_a_value(monkeypatch):
    """What a CUDA graph asks for: no read by the host, no number that changes with the token."""
    modules, calls = [], []

    def keep(module, *how):
        modules.append(module)
        index = len(modules) - 1

        def run(*inputs):
            calls.append((index, [value for value in inputs if isinstance(value, int)]))
            return module.forward(*inputs)

        return run

    monkeypatch.setattr(backend, "compile_inner", keep)
    generate(compiled(room=16), tiny_inputs(FAMILY), TOKENS)
    assert len(modules) == 2, "prompt and decoding"
    targets = [str(getattr(n.target, "__name__", n.target)) for n in modules[1].graph.nodes]
    assert not {"item", "tolist", "nonzero", "_local_scalar_dense"} & set(targets)
    assert targets.count("index_copy_") == 2 * LAYERS
    returned = torch.fx.node.map_arg(modules[1].graph.output_node().args, lambda n: n)
    assert all(isinstance(n.meta["example_value"], torch.Tensor) for n in returned[0])
    numbers = [ints for index, ints in calls if index == 1]
    assert len(numbers) == TOKENS - 1
    assert all(ints == numbers[0] for ints in numbers)


def step(cache, seed):
    """One token of every layer, as a compiled model would decode it."""
    generator = torch.Generator().manual_seed(seed)
    cache.begin_step(ROOM)
    for layer in range(LAYERS):
        key = torch.randn(2, 2, 1, 16, generator=generator)
        cache.update(key, key + 1, layer)
    cache.end_step(True)


def grow(cache, seed, tokens=1):
    generator = torch.Generator().manual_seed(seed)
    for layer in range(LAYERS):
        key = torch.randn(2, 2, tokens, 16, generator=generator)
        cache.update(key, key + 1, layer)


OPERATIONS = {
    "crop": lambda cache: cache.crop(-2),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 1])),
    "fork": lambda cache: cache.fork(),
    "keep": lambda cache: [x.keep_only(torch.tensor([0, 3, 6])) for x in cache.layers] and None,
    "save": lambda cache: _reloaded(cache),
    "append": lambda cache: grow(cache, 9, 3),
    "nothing": lambda cache: None,
}


def _reloaded(cache):
    loaded = StarKVCache(tiny_model(FAMILY).config)
    loaded.load_state_dict(cache.state_dict())
    return loaded


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_between_steps(operation):
    """After each the cache holds what one that grew holds, and decoding goes on."""
    caches = [StarKVCache(tiny_model(FAMILY).config) for _ in range(2)]
    for i, (cache, add) in enumerate(zip(caches, (step, grow), strict=True)):
        grow(cache, 0, 6)
        for seed in (1, 2, 3):
            add(cache, seed)
        caches[i] = OPERATIONS[operation](cache) or cache
        for seed in (4, 5, 6):
            add(caches[i], seed)
    buffered, grown = caches
    for left, right in zip(buffered.layers, grown.layers, strict=True):
        assert left.filled == left.stored == right.stored
        assert left.seen == right.seen
        assert torch.equal(left.places(), right.places())
        assert torch.equal(left.keys[:, :, : left.filled], right.keys)
        assert torch.equal(left.values[:, :, : left.filled], right.values)
        assert not left.keys[:, :, left.filled :].any()


def test_a_fork_does_not_see_what_is_written_later():
    cache = StarKVCache(tiny_model(FAMILY).config)
    grow(cache, 0, 6)
    step(cache, 1)
    twin = cache.fork()
    before = twin.layers[0].keys.clone()
    cache.crop(-1)
    step(cache, 2)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(twin.layers[0].keys, before)


def test_beams_are_reordered_where_they_are():
    cache = StarKVCache(tiny_model(FAMILY).config)
    grow(cache, 0, 6)
    step(cache, 1)
    keys, place = cache.layers[0].keys.clone(), cache.layers[0].keys.data_ptr()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.layers[0].keys.data_ptr() == place
    assert torch.equal(cache.layers[0].keys, keys[[1, 0]])


def test_bytes_count_the_free_slots():
    model = compiled(room=16)
    cache = generate(model, tiny_inputs(FAMILY), 4).past_key_values
    slots = cache.layers[0].kept.shape[1] + 16
    assert cache.nbytes == LAYERS * 2 * 2 * slots * 16 * 4
    told = starkv_compile.report(model).layers
    assert sum(layer.nbytes for layer in told) == cache.nbytes
    assert {layer.stored for layer in told} == {slots - 16}


@pytest.mark.slow
def test_a_step_that_fails_is_as_if_it_had_not_been():
    model = compiled("llava")
    inputs = tiny_inputs("llava")
    out = generate(model, inputs, 4)
    cache, token = out.past_key_values, out.sequences[:, -1:]
    before = (cache.get_seq_length(), cache.layers[0].stored)

    def fail(*_):
        raise RuntimeError("lost")

    hook = model.lm_head.register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(RuntimeError, match="lost"):
        model(input_ids=token, past_key_values=cache)
    hook.remove()
    assert not cache.shared.stepping
    assert (cache.get_seq_length(), cache.layers[0].stored) == before
    with torch.no_grad():
        again = model(input_ids=token, past_key_values=cache).logits
    longer = generate(model, inputs, 5)
    torch.testing.assert_close(again[:, -1], longer.logits[-1])
    assert cache.layers[0].filled == before[1] + 1
    model(input_ids=token, past_key_values=cache)
    assert cache.layers[0].filled is None, "written in place there would be no gradients"


@pytest.mark.slow
def test_a_model_no_longer_compiled_goes_on(grown):
    """Nobody tells its masks of free slots: the tokens are taken out of the buffers."""
    model = compiled()
    first = generate(model, tiny_inputs(FAMILY), 4)
    cache = first.past_key_values
    starkv_compile.undo(model)
    ids = first.sequences
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(
        generate(model, more, TOKENS - 4, past_key_values=cache).sequences, grown.sequences
    )
    assert cache.layers[0].filled is None


@pytest.mark.slow
def test_an_attention_without_a_mask_grows_instead_and_says_so():
    AttentionInterface.register("maskless", sdpa_attention_forward)
    inputs = tiny_inputs(FAMILY, TinyPrompt((), 40))
    models = [tiny_model(FAMILY) for _ in range(2)]
    for model in models:
        model.model.language_model.set_attn_implementation("maskless")
    expected = generate(compiled(room=None, model=models[0]), inputs, 6)
    model = compiled(model=models[1])
    with pytest.warns(UserWarning, match="decode_tokens=4: maskless does not read the mask"):
        out = generate(model, inputs, 6)
    report = starkv_compile.report(model)
    assert (report.refusals, len(report.without_buffers)) == ([], 1)
    assert "decoded without buffers: maskless" in str(report)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.past_key_values.layers[0].filled is None


def test_layers_of_different_lengths_have_no_common_slot():
    cache = StarKVCache(tiny_model(FAMILY).config)
    grow(cache, 0, 6)
    cache.layers[0].keep_only(torch.tensor([0, 5]))
    with pytest.raises(starkv_compile.CacheError, match=r"store \[2, 6\] tokens"):
        cache.begin_step(ROOM)
    assert cache.layers[1].filled is None


MODES = {
    "float32": contextlib.nullcontext,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", torch.float16),
    "inference": torch.inference_mode,
}


def prompt_then_tokens(model, cache, modes):
    """The logits of a prompt and of single tokens after it, each computed in its mode."""
    inputs, logits = tiny_inputs("llava"), []
    seen = inputs["input_ids"].shape[1]
    for number, mode in enumerate(modes):
        if number:
            inputs = {"input_ids": torch.tensor([[20 + number]])}
            inputs["attention_mask"] = torch.ones(1, seen + number, dtype=torch.long)
        with torch.no_grad(), MODES[mode]():
            logits.append(model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1])
    return logits


@pytest.mark.parametrize("room", [3, slow(None)])
@pytest.mark.parametrize(
    "modes",
    [
        "float32 float32 bfloat16",
        slow("bfloat16 bfloat16 float32"),
        slow("float32 float32 bfloat16 float32 bfloat16"),
        slow("bfloat16 float32 float32 bfloat16 float32"),
        slow("float16 float32 float16 bfloat16 float32"),
        slow("inference float32 inference bfloat16 float32"),
        slow("bfloat16 inference float32 inference bfloat16"),
    ],
)
def test_a_change_of_dtype_widens_the_cache_as_in_the_plain_one(modes, room):
    """At budget 1.0 the cache is the stock one, token by token."""
    modes, layers = modes.split(), 1  # each change is one more graph
    plain = tiny_model("llava", num_hidden_layers=layers)
    stock = transformers.DynamicCache(config=plain.config.get_text_config())
    expected = prompt_then_tokens(plain, stock, modes)
    model = compiled("llava", room, layers=layers, budget=1.0)
    cache = StarKVCache(model.config)
    for left, right in zip(prompt_then_tokens(model, cache, modes), expected, strict=True):
        assert left.dtype == right.dtype
        torch.testing.assert_close(left, right, rtol=2e-2, atol=2e-2)
    for ours, theirs in zip(cache.layers, stock.layers, strict=True):
        for name in ("keys", "values"):
            left, right = getattr(ours, name)[:, :, : ours.stored], getattr(theirs, name)
            assert left.dtype == right.dtype
            torch.testing.assert_close(left, right, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_buffers_that_a_wider_token_moved_are_buffers_again():
    model, addresses = compiled("llava", 8, layers=1), []
    cache = StarKVCache(model.config)
    model.register_forward_hook(lambda *_: addresses.append(cache.layers[0].values.data_ptr()))
    prompt_then_tokens(model, cache, ["bfloat16"] * 2 + ["float32"] * 4)
    assert len(set(addresses[3:])) == 1, "one move for the wider dtype, one to fixed addresses"
    assert cache.layers[0].values.dtype == torch.float32
    assert not cache.layers[0].values.is_inference()
