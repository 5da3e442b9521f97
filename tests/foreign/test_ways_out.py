"""Every warning that names a way out: the way is taken, and then the prompt is compressed."""

import copy
import warnings

import pytest
import torch
from transformers import (
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer

import starkv_compile
from starkv_compile import OptionError, StarKVCache
from starkv_compile.frontend.refusals import REFUSALS
from tests.foreign.core import LAYERS, PROMPT, WIDTH, filled, oracle, places_of
from tests.foreign.styles import LLAMA, STYLES, LibraryCache, MaskFromCache, OwnListByCaller
from tests.support.crossing import slow

OPTIONS = {"budget": 0.3, "inner": "eager"}
SHORT = {**OPTIONS, "shorten_outputs": True}
KEPT = PROMPT.shape[1] * 3 // 10
CONFIG = PreTrainedConfig(num_hidden_layers=LAYERS)


def llama(**changes):
    return filled(LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})))


def said(function, *args, **kwargs):
    """The result of a call without gradients, and starkv's warnings."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        result = function(*args, **kwargs)
    return result, [str(w.message) for w in caught if "starkv" in str(w.message)]


def stored(output):
    cache = next(output[name] for name in ("cache", "past_key_values") if output.get(name))
    return [layer.keys.shape[2] for layer in cache.layers]


def in_training():
    model = starkv_compile.compile(llama().train(), **OPTIONS)
    yield model, {}
    yield model.eval(), {}


def cross_attention():
    class Crossed(LibraryCache):
        def forward(
            self, input_ids, past_key_values: Cache | None = None, encoder_hidden_states=None
        ):
            return super().forward(input_ids, past_key_values)

    model = starkv_compile.compile(filled(Crossed(CONFIG)), **OPTIONS)
    yield model, {"encoder_hidden_states": torch.ones(1, 2, WIDTH)}
    yield model, {}


def without_cache():
    model = starkv_compile.compile(llama(), **OPTIONS)
    yield model, {"use_cache": False}
    yield model, {}


def packed_rows():
    model = starkv_compile.compile(llama(), **OPTIONS)
    yield model, {"position_ids": torch.arange(40)[None] % 20}
    rows = PROMPT.reshape(2, 20)
    yield model, {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def uneven_padding():
    model = starkv_compile.compile(llama(), **OPTIONS, policy="pyramidkv")
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :5] = 0
    yield model, {"input_ids": PROMPT.reshape(2, 20), "attention_mask": mask}
    yield model, {"input_ids": PROMPT[:, 5:20]}


def uneven_attention():
    model = llama()
    model.set_attn_implementation("flex_attention")
    yield starkv_compile.compile(model, **OPTIONS, policy="pyramidkv"), {}
    model.set_attn_implementation("sdpa")
    yield model, {}


def undeclared_cache():
    class Undeclared(LibraryCache):
        def forward(self, input_ids=None, past_key_values=None):
            return super().forward(input_ids, past_key_values)

    model = starkv_compile.compile(filled(Undeclared(CONFIG)), **OPTIONS)
    yield model, {}
    yield model, {"past_key_values": StarKVCache(model.config)}


def unknown_windows():
    model = filled(LibraryCache(CONFIG))
    model.config = PreTrainedConfig()
    starkv_compile.compile(model, **OPTIONS)
    yield model, {"past_key_values": DynamicCache()}
    yield model, {"past_key_values": StarKVCache(PreTrainedConfig(num_hidden_layers=2))}


def other_cache():
    model = starkv_compile.compile(llama(), **OPTIONS)
    yield model, {"cache": StaticCache(model.config, max_cache_len=128)}
    yield model, {"cache": DynamicCache(config=model.config)}


def foreign_tokens():
    model = llama()
    with torch.no_grad():
        cache = model(input_ids=PROMPT[:, :20]).cache
    starkv_compile.compile(model, **OPTIONS)
    yield model, {"input_ids": PROMPT[:, 20:], "cache": cache}
    yield model, {"cache": StarKVCache(model.config)}


def other_layers():
    model = starkv_compile.compile(llama(), **OPTIONS)
    beside = StarKVCache(model.config)
    beside.layers[1] = DynamicLayer()
    yield model, {"cache": beside}
    yield model, {"cache": StarKVCache(model.config)}


def drafted_prompt():
    model = starkv_compile.compile(llama(), **OPTIONS)
    yield model, {"logits_to_keep": 4}
    yield model, {"logits_to_keep": 1}


@pytest.mark.slow(ci=True)
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.__name__)
def test_a_refused_call_and_the_same_call_put_right(refusal):
    calls = globals()[refusal.__name__]()
    model, arguments = next(calls)
    output, texts = said(model, **{"input_ids": PROMPT, **arguments})
    assert len(texts) == 1
    assert texts[0].startswith("starkv left this call uncompressed: ")
    _, again = said(model, **{"input_ids": PROMPT, **arguments})
    assert not again or "cache" in arguments, "each reason is said once"
    model, arguments = next(calls)
    arguments = {"input_ids": PROMPT, **arguments}
    output, texts = said(model, **arguments)
    assert not texts
    length = arguments["input_ids"].shape[1]
    assert sum(stored(output)) == LAYERS * max(2, length * 3 // 10)


def test_a_module_without_a_cache_of_transformers():
    """Either way that the warning names: a Cache, or outputs that the caller counts."""
    with pytest.warns(UserWarning, match=r"past_key_values: Cache .*shorten_outputs") as caught:
        torch.compile(filled(OwnListByCaller()), backend="starkv", options=OPTIONS)
    assert len(caught) == 1
    model = starkv_compile.compile(filled(LibraryCache(CONFIG)), **OPTIONS)
    output, texts = said(model, input_ids=PROMPT)
    assert (stored(output), texts) == ([KEPT] * LAYERS, [])


@pytest.mark.parametrize("style", ["own list, positions from the caller", "own generate, own list"])
@pytest.mark.parametrize("way", ["torch.compile", "model.compile", "starkv_compile.compile"])
def test_outputs_that_the_caller_counts(style, way):
    model = STYLES[style].make()
    entry, how = model, {"backend": "starkv", "fullgraph": True, "options": SHORT}
    if way == "torch.compile":
        entry = torch.compile(model, **how)
    elif way == "model.compile":
        model.compile(**how)
    else:
        starkv_compile.compile(model, **SHORT)
    talk, texts = said(STYLES[style].talk, entry, model)
    assert not texts
    assert [key.shape[2] for key, _ in talk.stored] == [KEPT] * LAYERS
    tokens, logits = oracle(model, PROMPT, places_of(model, PROMPT, talk.stored))
    assert talk.tokens == tokens
    torch.testing.assert_close(talk.logits, logits, atol=1e-4, rtol=1e-4)


def test_the_decoder_of_a_model_with_a_generate_of_its_own():
    model = STYLES["own generate of a decoder"].make()
    model.decoder.compile(backend="starkv", fullgraph=True, options=SHORT)
    talk, texts = said(model.generate)
    assert not texts
    assert [key.shape[2] for key, _ in talk.stored] == [KEPT] * LAYERS
    assert (
        talk.tokens
        == oracle(model.decoder, PROMPT, places_of(model.decoder, PROMPT, talk.stored))[0]
    )


def test_shortened_outputs_need_one_graph():
    model = filled(OwnListByCaller())
    for compiled in (model, model.forward, lambda x: x):
        with pytest.raises(OptionError, match=r"use torch\.compile\(\.\.\., fullgraph=True\)"):
            torch.compile(compiled, backend="starkv", options=SHORT)
    with pytest.raises(
        OptionError, match=r"shorten_outputs=True: LlamaForCausalLM .* leave it out"
    ):
        starkv_compile.compile(llama(), **SHORT)


@pytest.mark.slow(ci=True)
def test_a_function_around_a_model():
    """Compiling the model itself, as the warning says, works inside and outside the function."""
    model = llama()
    step = torch.compile(lambda ids: model(input_ids=ids, use_cache=True), **_ours())
    _, texts = said(step, PROMPT)
    assert len(texts) == 1
    assert "starkv_compile.compile(model)" in texts[0]
    starkv_compile.compile(model, **OPTIONS)
    torch._dynamo.reset()
    plain = torch.compile(lambda ids: model(input_ids=ids, use_cache=True), backend="eager")
    output, texts = said(plain, PROMPT)
    assert (stored(output), texts) == ([KEPT] * LAYERS, [])


def test_a_function_that_returns_keys_and_values():
    model = filled(OwnListByCaller())
    step = torch.compile(lambda ids: model(ids), fullgraph=True, **_ours(shorten_outputs=True))
    (_, cache), texts = said(step, PROMPT)
    assert [key.shape[2] for key, _ in cache] == [KEPT] * LAYERS
    assert not texts


def _ours(**more):
    return {"backend": "starkv", "options": {**OPTIONS, **more}}


def test_blocks_of_a_library_model():
    model = llama()
    for block in model.model.layers:
        with pytest.warns(UserWarning, match="a part of a language model.*compile the whole model"):
            block.compile(**_ours())
    output, _ = said(model, input_ids=PROMPT)
    assert stored(output) == [PROMPT.shape[1]] * LAYERS
    for block in model.model.layers:
        starkv_compile.undo(block)
    model.compile(**_ours())
    output, texts = said(model, input_ids=PROMPT)
    assert (stored(output), texts) == ([KEPT] * LAYERS, [])


def test_a_mask_of_all_tokens_seen():
    model = STYLES["mask of all tokens seen"].make()
    starkv_compile.compile(model, **OPTIONS)
    _, texts = said(model, input_ids=PROMPT)
    assert len(texts) == 1
    assert "cache.get_mask_sizes(tokens, layer)" in texts[0]
    output, texts = said(
        starkv_compile.compile(filled(MaskFromCache(CONFIG)), **OPTIONS), input_ids=PROMPT
    )
    assert (stored(output), texts) == ([KEPT] * LAYERS, [])


@pytest.mark.slow(ci=True)
def test_a_graph_break_between_cache_write_and_attention():
    class Broken(LibraryCache):
        def attend(self, q, k, v, mask):
            torch._dynamo.graph_break()
            return super().attend(q, k, v, mask)

    torch._dynamo.utils.counters.clear()
    model = starkv_compile.compile(filled(Broken(CONFIG)), **OPTIONS)
    output, texts = said(model, input_ids=PROMPT)
    assert stored(output) == [PROMPT.shape[1]] * LAYERS
    assert len(texts) == 1
    assert "TORCH_LOGS=graph_breaks shows the line" in texts[0]
    output, texts = said(starkv_compile.compile(filled(LibraryCache(CONFIG)), **OPTIONS), PROMPT)
    assert (stored(output), texts) == ([KEPT] * LAYERS, [])


@pytest.mark.slow(ci=True)
def test_layers_of_another_kind():
    model = filled(MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=24)))
    starkv_compile.compile(model, **OPTIONS)
    for cache in (None, DynamicCache()):
        output, texts = said(model, input_ids=PROMPT, cache=cache)
        assert stored(output) == [23, 23]
        assert not texts or "kind DynamicSlidingWindowLayer" in texts[0]
    assert "DynamicSlidingWindowLayer, which stays" in str(starkv_compile.report(model))


@pytest.mark.parametrize("budget", [slow(1.0, ci=True), 0.3])
def test_the_cache_argument_by_position(budget):
    """Given as None, it is replaced; a cache given there is used."""
    model = starkv_compile.compile(llama(), budget=budget, inner="eager")
    kept = [KEPT if budget < 1 else PROMPT.shape[1]] * LAYERS
    output, texts = said(model, PROMPT, None, None, None)
    assert (stored(output), texts) == (kept, [])
    cache = DynamicCache(config=model.config)
    output, texts = said(model, PROMPT, None, None, cache)
    assert output.cache is cache
    assert (stored(output), texts) == (kept, [])


@pytest.mark.slow(ci=True)
def test_buffers_for_a_model_of_ones_own():
    """It has to say that a length may be a tensor."""
    talks = []
    for declared in (False, True):
        kind = type("Own", (MaskFromCache,), {"_can_compile_fullgraph": declared})
        model = starkv_compile.compile(filled(kind(CONFIG)), **OPTIONS, decode_tokens=16)
        talk, texts = said(MaskFromCache.talk, model, model)
        assert len(texts) == (0 if declared else 1)
        assert declared or "set _can_compile_fullgraph = True" in texts[0]
        talks.append(talk)
    grown, buffered = talks
    assert grown.tokens == buffered.tokens
    torch.testing.assert_close(grown.logits, buffered.logits, atol=1e-5, rtol=1e-5)


def test_tokens_under_another_name():
    class Renamed(LibraryCache):
        def forward(self, tokens, past_key_values: DynamicCache | None = None):
            return super().forward(tokens, past_key_values)

    model = starkv_compile.compile(filled(Renamed(CONFIG)), **OPTIONS)
    output, texts = said(model, PROMPT)
    assert (stored(output), texts) == ([KEPT] * LAYERS, [])
    after, texts = said(model, PROMPT[:, :1], past_key_values=output.past_key_values)
    assert (stored(after), texts) == ([KEPT + 1] * LAYERS, [])


def test_a_model_that_ignores_its_cache():
    class Ignores(LibraryCache):
        def forward(self, input_ids=None, past_key_values: DynamicCache | None = None):
            return super().forward(input_ids, DynamicCache(config=self.config))

    model = starkv_compile.compile(filled(Ignores(CONFIG)), **OPTIONS)
    _, texts = said(model, input_ids=PROMPT)
    assert len(texts) == 1
    assert "the model stored nothing in the cache" in texts[0]


def test_a_copy_is_not_compiled_and_says_so():
    model = starkv_compile.compile(llama(), **OPTIONS)
    twin = copy.deepcopy(model)
    output, texts = said(twin, input_ids=PROMPT)
    assert stored(output) == [PROMPT.shape[1]] * LAYERS
    assert len(texts) == 1
    assert "copy of a compiled model" in texts[0]
    assert not said(twin, input_ids=PROMPT)[1], "it is said once"
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    assert not torch.equal(
        said(twin, input_ids=PROMPT)[0].logits, said(model, input_ids=PROMPT)[0].logits
    )
    output, texts = said(starkv_compile.compile(twin, **OPTIONS), input_ids=PROMPT)
    assert (stored(output), texts) == ([KEPT] * LAYERS, [])


@pytest.mark.slow(ci=True)
def test_a_cache_that_holds_a_set_for_each_head():
    ids = PROMPT[:, :20].contiguous()
    model = starkv_compile.compile(llama(), policy="snapkv", **OPTIONS)
    output, texts = said(model, PROMPT, past_key_values=StarKVCache(model.config))
    assert not texts
    cache = output.past_key_values
    starkv_compile.compile(model, policy="snapkv_mean", **OPTIONS)
    output, (text,) = said(model, ids, past_key_values=cache.fork())
    assert "begin a new cache, or continue with a policy that keeps a set for each head" in text
    assert stored(output) == [KEPT + 20] * len(cache.layers)
    _, texts = said(model, PROMPT, past_key_values=(new := StarKVCache(model.config)))
    assert not texts
    assert [layer.stored for layer in new.layers] == [KEPT] * len(cache.layers)
    starkv_compile.compile(model, policy="mixkv", **OPTIONS)
    output, texts = said(model, ids, past_key_values=cache)
    assert not texts
    assert stored(output) == [(PROMPT.shape[1] + 20) * 3 // 10] * len(cache.layers)
