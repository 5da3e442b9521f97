"""`nbits`: kept tokens in codes, and everything else as in the model's precision."""

import pytest
import torch

import starkv_compile
from starkv_compile import CacheError, OptionError, StarKVCache, StarKVConfig
from starkv_compile.cache.quantized import quantize_tokens
from starkv_compile.kernels.ops import STARKV
from starkv_compile.kernels.reference.quantization import centre_of, dequantize, quantize
from starkv_compile.passes import apply
from starkv_compile.testing import LAYERS, TinyPrompt, generate, tiny_inputs, tiny_model
from tests.support.crossing import first_in_ci, slow
from tests.support.turns import two_turns

FAMILY, WINDOW = "qwen2_5_vl", 8


def compressed(nbits=4, **options):
    budget = {} if {"budget_tokens", "budget_bytes"} & options.keys() else {"budget": 0.4}
    options = {"inner": "eager", **budget, **options}
    return starkv_compile.compile(tiny_model(FAMILY), nbits=nbits, **options)


def after(nbits, tokens=1, prompts=(), **options):
    """A reply, and the cache after it."""
    output = generate(compressed(nbits, **options), tiny_inputs(FAMILY, *prompts), tokens)
    return output, output.past_key_values


@pytest.mark.parametrize(("nbits", "policy"), [slow(8, "snapkv", ci=True), (4, "screen_novelty")])
def test_the_same_tokens_are_kept_and_all_but_the_window_are_quantized(nbits, policy):
    (_, full), (_, cache) = (after(n, policy=policy) for n in (16, nbits))
    for exact, layer in zip(full.layers, cache.layers, strict=True):
        assert torch.equal(exact.kept, layer.kept)
        assert layer.in_full == WINDOW
        assert layer.stored == exact.stored == WINDOW + layer.quantized.tokens
        for name in ("keys", "values"):
            rows, found = getattr(exact, name), getattr(layer, name)
            older = rows[:, :, :-WINDOW]
            expected = dequantize(*quantize(older, centre_of(older), nbits), rows.dtype)
            assert torch.equal(found[:, :, -WINDOW:], rows[:, :, -WINDOW:])
            # The second layer's input is another one already.
            torch.testing.assert_close(found[:, :, :-WINDOW], expected, rtol=1e-3, atol=1e-3)


def test_the_bytes_that_are_stored_are_reported():
    model = compressed(4, budget=0.5)
    cache = generate(model, tiny_inputs(FAMILY), 1).past_key_values
    storages = {}
    for layer in cache.layers:
        assert layer._keys.shape[2] == WINDOW
        parts = (layer._keys, layer._values, *layer.quantized.key, *layer.quantized.value)
        for tensor in parts:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    report = starkv_compile.report(model)
    assert cache.nbytes == report.nbytes == sum(storages.values())
    assert (report.layers[0].coded, report.layers[0].nbits) == (layer.quantized.tokens, 4)
    assert f"4 bits: all kept tokens but the newest {WINDOW}" in str(report)
    tokens, heads, dim = layer.quantized.tokens, layer._keys.shape[1], layer._keys.shape[3]
    codes = 2 * heads * tokens * (dim // 2 + 4) + 2 * heads * dim * 4
    assert cache.nbytes == 2 * (codes + 2 * heads * WINDOW * dim * 4)
    assert cache.full_nbytes == 2 * 2 * heads * layer.seen * dim * 4


@pytest.mark.parametrize(("nbits", "room"), [(8, None), slow(4, 6, ci=True)])
def test_a_budget_in_bytes_is_spent_on_codes(nbits, room):
    """Up to the bytes of one more token, in every prompt of a session and in every batch row."""
    prompts = (TinyPrompt(), TinyPrompt(((4, 4),), 16, seed=3))
    inputs = tiny_inputs(FAMILY, *prompts)
    token = 2 * LAYERS * 2 * 2 * (16 * nbits // 8 + 4)  # rows, layers, keys and values, heads
    full = 2 * LAYERS * 2 * 2 * 16 * 4
    centres, tokens = full, 25
    budget = centres + (WINDOW + (room or 0)) * full + tokens * token + token // 2
    model = compressed(nbits, budget_bytes=budget, decode_tokens=room)
    cache = generate(model, inputs, 6 if room else 1).past_key_values
    stored = layer_bytes_of(cache)
    assert budget - token < stored <= budget
    assert cache.nbytes == stored
    assert cache.layers[0].quantized.tokens == tokens


def layer_bytes_of(cache):
    tensors = [
        tensor
        for layer in cache.layers
        for tensor in (layer._keys, layer._values, *layer.quantized.key, *layer.quantized.value)
    ]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_a_budget_in_bytes_with_hardly_room_for_the_window():
    model = compressed(4, budget_bytes=LAYERS * 2 * 2 * 16 * 4 * 5)
    cache = generate(model, tiny_inputs(FAMILY), 1).past_key_values
    assert cache.nbytes <= LAYERS * 2 * 2 * 16 * 4 * 5
    assert cache.layers[0].quantized is None


@pytest.mark.parametrize(
    ("nbits", "policy"), [slow(4, "snapkv", ci=True), slow(8, "screen_novelty")]
)
def test_no_token_is_rounded_twice_in_thirty_steps(nbits, policy):
    model = compressed(nbits, budget_tokens=40, policy=policy)
    cache, known, stayed = StarKVCache(model.config), {}, 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        ids = torch.randint(5, 180, (1, 9), generator=generator)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        layer = cache.layers[1]
        place = layer.quantized.place
        heads = place[0] if place.dim() == 3 else place.expand(layer._keys.shape[1], -1)
        now = {}
        for head, places in enumerate(heads.tolist()):
            for slot, token in enumerate(places):
                parts = (*layer.quantized.key[:2], *layer.quantized.value[:2])
                now[head, token] = [part[0, head, slot] for part in parts]
        for name in now.keys() & known.keys():
            stayed += 1
            assert all(torch.equal(a, b) for a, b in zip(now[name], known[name], strict=True))
        known = now
    assert stayed > 100
    assert cache.layers[1].stored == 40


@pytest.mark.parametrize(
    ("implementation", "options"),
    [slow("eager", {}, ci=True), ("sdpa", {"decode_tokens": 5}), slow("sdpa", {"budget": 1.0})],
)
def test_decoding_reads_codes(monkeypatch, tmp_path, implementation, options):
    monkeypatch.setenv("STARKV_DUMP", str(tmp_path))
    model = tiny_model(FAMILY)
    model.set_attn_implementation(implementation)
    starkv_compile.compile(model, **{"budget": 0.4, "nbits": 4, "inner": "eager", **options})
    generate(model, tiny_inputs(FAMILY), 3)
    graphs = [path.read_text() for path in tmp_path.glob("*ReadCodes-after.txt")]
    decoding = [graph for graph in graphs if "quantized_attention" in graph]
    assert decoding
    assert not any("dequantize" in graph for graph in graphs)


@pytest.mark.slow(ci=True)
def test_buffers_give_what_a_growing_cache_gives():
    (grown, _), (output, cache) = after(4, 12), after(4, 12, decode_tokens=5)
    assert torch.equal(grown.sequences, output.sequences)
    for a, b in zip(grown.logits, output.logits, strict=True):
        torch.testing.assert_close(a, b)
    assert cache.layers[0].filled == cache.layers[0].in_full == WINDOW + 11


@pytest.mark.parametrize("decode_tokens", [slow(None, ci=True), slow(16)])
def test_beams_and_rows_move_codes_with_them(decode_tokens):
    model = compressed(4, decode_tokens=decode_tokens)
    prompts = (TinyPrompt(), TinyPrompt(((4, 4),), 16, seed=3))
    cache = generate(model, tiny_inputs(FAMILY, *prompts), 6, num_beams=3).past_key_values
    before = [layer.keys for layer in cache.layers]
    rows = torch.tensor([5, 0, 0, 3])
    cache.batch_select_indices(rows)
    for keys, layer in zip(before, cache.layers, strict=True):
        assert layer.quantized.key.codes.shape[0] == 4
        assert torch.equal(layer.keys, keys[rows])


@pytest.mark.slow(ci=True)
def test_a_fork_and_a_crop():
    _, cache = after(4, 6)
    fork, keys = cache.fork(), cache.layers[0].keys.clone()
    fork.crop(-3)
    assert torch.equal(fork.layers[0].keys, keys[:, :, :-3])
    assert torch.equal(cache.layers[0].keys, keys)
    fork.reset()
    assert fork.layers[0].quantized is None


@pytest.mark.slow(ci=True)
def test_a_crop_into_the_codes_of_a_cache_that_dropped_nothing():
    _, cache = after(8, 4, budget=1.0)
    layer = cache.layers[0]
    stored, coded, keys = layer.stored, layer.quantized.tokens, layer.keys.clone()
    assert stored == layer.seen
    cache.crop(-(stored - coded + 5))
    assert (layer.stored, layer.quantized.tokens, layer.in_full) == (coded - 5, coded - 5, 0)
    assert torch.equal(layer.keys, keys[:, :, : coded - 5])


@pytest.mark.slow
def test_a_second_prompt_and_what_it_answers():
    """The reply is near that of a cache in the model's precision, and nothing else changes."""
    caches = []
    for nbits in (16, 8):
        model = compressed(nbits)
        cache = StarKVCache(model.config)
        output = two_turns(model, FAMILY, cache)
        caches.append((output, cache))
    (exact, full), (output, cache) = caches
    assert torch.equal(exact.sequences, output.sequences)
    torch.testing.assert_close(exact.logits[0], output.logits[0], rtol=0.05, atol=0.05)
    assert [x.stored for x in full.layers] == [x.stored for x in cache.layers]
    assert cache.nbytes < 0.6 * full.nbytes


@pytest.mark.slow(ci=True)
def test_a_padded_batch():
    prompts = (TinyPrompt(), TinyPrompt(((4, 4),), 16, seed=3))
    (exact, _), (output, cache) = (after(n, 5, prompts=prompts) for n in (16, 8))
    assert torch.equal(exact.sequences, output.sequences)
    assert cache.layers[0].quantized.key.codes.shape[0] == 2


@pytest.mark.slow(ci=True)
def test_another_number_of_bits_is_refused_and_16_bits_store_all_in_full():
    _, cache = after(4)
    ids = torch.randint(5, 180, (1, 12))
    before = cache.nbytes
    with pytest.raises(CacheError, match="holds tokens in 4 bits, and the model was compiled with"):
        compressed(8)(input_ids=ids, past_key_values=cache)
    assert cache.nbytes == before
    model = compressed(16)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    layer = starkv_compile.report(model).layers[0]
    assert (layer.nbits, layer.coded) == (16, 0)
    assert cache.layers[0].earlier is None
    assert cache.layers[0]._keys.shape[2] == layer.stored


@pytest.mark.parametrize("inner", first_in_ci(["eager", "aot_eager"]))
def test_under_autocast_codes_are_exact(inner):
    model = compressed(8, inner=inner)
    with torch.autocast("cpu", torch.bfloat16):
        cache = generate(model, tiny_inputs(FAMILY), 3).past_key_values
    layer = cache.layers[0]
    keys = layer._keys
    assert layer.quantized.key.centre.dtype == torch.float32
    plain = compressed(16, inner=inner)
    with torch.autocast("cpu", torch.bfloat16):
        full = generate(plain, tiny_inputs(FAMILY), 3).past_key_values.layers[0]
    older = full.keys[:, :, : layer.quantized.tokens]
    expected = dequantize(*quantize(older, centre_of(older), 8), keys.dtype)
    torch.testing.assert_close(layer.keys[:, :, : layer.quantized.tokens], expected)


@pytest.mark.slow(ci=True)
def test_nothing_is_left_of_codes_that_are_cropped():
    _, cache = after(8, budget=1.0)
    cache.crop(-cache.get_seq_length())
    assert cache.layers[0].quantized is None
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("tokens", first_in_ci([5, 12]))
def test_few_bits_never_keep_less_than_16(tokens):
    budget = LAYERS * 2 * 2 * 16 * 4 * tokens
    stored = []
    for nbits in (16, 8, 4):
        model = compressed(nbits, budget_bytes=budget, policy="snapkv")
        cache = generate(model, tiny_inputs(FAMILY), 1).past_key_values
        assert cache.nbytes <= budget
        stored.append(cache.layers[0].stored)
    assert max(stored[:1]) <= min(stored[1:])


@pytest.mark.parametrize("rows", [2, 3])
def test_codes_of_one_set_go_to_the_heads_of_their_row(rows):
    """A policy with one set for all heads, and then one with a set for each."""
    torch.manual_seed(0)
    key, value = torch.randn(2, rows, 2, 12, 16).unbind()
    place = torch.arange(12).expand(rows, -1) + 100 * torch.arange(rows)[:, None]
    before = quantize_tokens(key, value, place, 8, None)
    stay = torch.stack([torch.arange(6), torch.arange(3, 9)]).expand(rows, -1, -1)
    shorter = [t.gather(2, stay[..., None].expand(-1, -1, -1, 16)) for t in (key, value)]
    places = place[:, None].expand(-1, 2, -1).gather(-1, stay)
    after = quantize_tokens(*shorter, places, 8, before)
    for side, old in ((after.key, before.key), (after.value, before.value)):
        assert torch.equal(side.codes, old.codes.gather(2, stay[..., None].expand(-1, -1, -1, 16)))
        assert torch.equal(side.ranges, old.ranges.gather(2, stay[..., None].expand(-1, -1, -1, 2)))


def test_keys_put_in_by_hand_while_decoding_in_buffers():
    cache = StarKVCache(tiny_model(FAMILY).config)
    for layer in range(LAYERS):
        cache.update(*torch.randn(2, 1, 2, 20, 16), layer)
    cache.quantize(8, in_full=4)
    cache.begin_step(6)
    cache.end_step(written=False)
    layer = cache.layers[0]
    before = layer.keys[:, :, :20].clone()
    layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    assert (layer.stored, layer.seen) == (20, 20)
    layer.settle()
    assert torch.equal(layer.keys, before)


def test_keys_put_in_by_hand():
    _, cache = after(4)
    layer = cache.layers[0]
    keys = layer.keys.clone() * 2
    layer.keys = keys
    assert torch.equal(layer.keys, keys)
    with pytest.raises(CacheError, match="were put into a layer"):
        layer.keys = keys[:, :, 1:]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nbits": 3}, "nbits=3: expected one of 16, 8, 4"),
        ({"nbits": True}, "nbits=True: expected one of"),
        ({"nbits": 4, "shorten_outputs": True}, "leave out nbits"),
    ],
)
def test_impossible_options(options, said):
    with pytest.raises(OptionError, match=said):
        StarKVConfig(**options)


def test_a_graph_of_your_own_returns_no_codes():
    graph = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
    with pytest.raises(OptionError, match=r"nbits=8 with apply\(\)"):
        apply(graph, StarKVConfig(nbits=8))


@pytest.mark.slow(ci=True)
def test_a_compiled_model_gives_what_an_eager_one_gives():
    (eager, kept), (output, cache) = (after(4, 4, inner=i) for i in ("eager", "aot_eager"))
    assert torch.equal(eager.sequences, output.sequences)
    for a, b in zip(kept.layers, cache.layers, strict=True):
        assert torch.equal(a.kept, b.kept)
        torch.testing.assert_close(a.keys, b.keys)


@pytest.mark.slow(ci=True)
@pytest.mark.parametrize("nbits", [8, 4])
def test_inductor_turns_codes_back(nbits):
    rows = torch.randn(1, 2, 9, 80, generator=torch.Generator().manual_seed(0))
    parts = quantize(rows, centre_of(rows), nbits)
    found = torch.compile(STARKV.dequantize)(*parts, torch.float32)
    torch.testing.assert_close(found, dequantize(*parts, torch.float32))
