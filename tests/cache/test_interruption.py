"""A call that stops between layers: the next one raises, as some layers lack its tokens."""

import contextlib

import pytest
import torch
import transformers
from transformers import DynamicCache

import starkv_compile
from starkv_compile import CacheError, StarKVCache
from starkv_compile.cache.interruption import whole_call
from starkv_compile.hf.cache_argument import with_cache
from starkv_compile.testing import generate, tiny_model

TEXT = torch.arange(20, 45)[None]
TOKEN = torch.tensor([[30]])


class Stopped(Exception):
    """The interruption."""


@contextlib.contextmanager
def stops_before(module):
    """Calls of `module` raise, and the graph breaks there."""

    def stop(*_):
        raise Stopped

    hook = module.register_forward_pre_hook(torch._dynamo.disable(stop))
    try:
        with pytest.raises(Stopped):
            yield
    finally:
        hook.remove()


def compiled(**options):
    model = tiny_model("llava")
    return starkv_compile.compile(model, **{"budget": 1.0, "inner": "eager", **options})


@pytest.fixture(autouse=True)
def _eagerly(request):
    """Nothing is compiled, which is as if the graph broke everywhere."""
    stance = "default" if "graph" in request.function.__name__ else "force_eager"
    with torch.compiler.set_stance(stance):
        yield


def step(model, ids, cache):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def stock(model):
    return DynamicCache(config=model.config.get_text_config())


def layers(model):
    return model.get_decoder().layers


@pytest.mark.slow
def test_a_graph_that_breaks_between_layers():
    model = compiled(budget=0.5)
    cache = StarKVCache(model.config)
    with stops_before(layers(model)[1]):
        step(model, TEXT, cache)
    with pytest.raises(CacheError, match=r"\(layer 0: 25, layer 1: 0\)"):
        step(model, TEXT, cache)


@pytest.mark.filterwarnings("ignore:starkv left this call uncompressed")
@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_a_first_prompt_that_stops_ends_the_cache(kind):
    model = compiled(budget=0.5)
    cache = StarKVCache(model.config) if kind == "ours" else stock(model)
    with stops_before(layers(model)[1]):
        step(model, TEXT, cache)
    for ids in (TEXT, TOKEN):
        with pytest.raises(CacheError, match=r"\(layer 0: 25, layer 1: 0\).*Begin a new cache"):
            step(model, ids, cache)
    whole = step(model, TEXT, StarKVCache(model.config))
    assert torch.equal(whole, tiny_model("llava")(input_ids=TEXT).logits), "the way out"


@pytest.mark.parametrize("ids", [TEXT, TOKEN], ids=["prompt", "step"])
def test_a_later_call_that_stops_ends_the_cache_but_not_its_forks(ids):
    model = compiled()
    cache = StarKVCache(model.config)
    step(model, TEXT, cache)
    fork, twin = cache.fork(), cache.fork()
    with stops_before(layers(model)[1]):
        step(model, ids, cache)
    gained = ids.shape[1]
    for use in (
        lambda: step(model, TOKEN, cache),
        lambda: generate(model, {"input_ids": torch.cat([TEXT, TEXT], 1)}, **with_cache(cache)),
        cache.fork,
        cache.state_dict,
        lambda: cache.crop(-1),
        lambda: cache.keep_newest_frames(1),
    ):
        with pytest.raises(CacheError, match=rf"layer 0: {25 + gained}, layer 1: 25"):
            use()
    assert torch.equal(step(model, ids, fork), step(model, ids, twin)), "the way out"
    cache.reset()
    assert torch.equal(step(model, TEXT, cache), step(model, TEXT, StarKVCache(model.config)))


def test_without_a_check_the_answer_would_be_wrong(monkeypatch):
    """So the error is no more than is needed."""
    monkeypatch.setattr(StarKVCache, "check_whole", lambda self: None)
    model = compiled()
    cache = StarKVCache(model.config)
    step(model, TEXT, cache)
    with stops_before(layers(model)[1]):
        step(model, TOKEN, cache)
    again = step(model, TOKEN, cache)
    right = StarKVCache(model.config)
    step(model, TEXT, right)
    assert not torch.allclose(again, step(model, TOKEN, right), atol=1e-4)


@pytest.mark.parametrize("where", ["embeddings", "head"])
def test_a_call_that_stops_before_or_after_all_layers_ends_nothing(where):
    model = compiled()
    cache = StarKVCache(model.config)
    step(model, TEXT, cache)
    module = model.get_input_embeddings() if where == "embeddings" else model.lm_head
    with stops_before(module):
        step(model, TOKEN, cache)
    step(model, TOKEN, cache)
    assert len({layer.seen for layer in cache.layers}) == 1


def test_a_step_in_buffers_that_stops_may_be_repeated():
    """Its slot is written again."""
    model = compiled(decode_tokens=4)
    cache, right = StarKVCache(model.config), StarKVCache(model.config)
    for each in (cache, right):
        step(model, TEXT, each)
        step(model, TOKEN, each)
    with stops_before(layers(model)[1]):
        step(model, TOKEN, cache)
    assert torch.equal(step(model, TOKEN, cache), step(model, TOKEN, right))


def layers_of(cache, tokens):
    """Stores `tokens[i]` new tokens in layer i."""
    for number, new in enumerate(tokens):
        if new:
            states = torch.zeros(1, 2, new, 16)
            cache.update(states, states.clone(), number)


def windowed():
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=4,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention"] * 2,
    )
    return StarKVCache(config)


@pytest.mark.parametrize(
    ("before", "during", "ends"),
    [
        ((9, 9, 9, 9), (5, 5, 5, 5), False),
        ((9, 9, 9, 9), (5, 5, 5, 0), True),
        ((9, 9, 9, 9), (5, 0, 0, 0), True),
        ((9, 9, 9, 9), (0, 0, 0, 0), False),
        ((9, 9, 9, 0), (5, 5, 5, 0), False),  # a layer that the model never uses
        ((9, 9, 9, 0), (5, 5, 0, 0), True),
        ((0, 0, 0, 0), (9, 0, 0, 0), True),
        ((0, 0, 0, 0), (0, 0, 0, 0), False),
    ],
)
def test_layers_with_a_window_count_and_unused_ones_do_not(before, during, ends):
    cache = windowed()
    layers_of(cache, before)
    interrupted_call(cache, during)
    assert (cache.shared.stopped_at is not None) == ends
    with pytest.raises(CacheError) if ends else contextlib.nullcontext(), whole_call((cache,), {}):
        pass


def interrupted_call(cache, during):
    with contextlib.suppress(Stopped), whole_call((), {"cache": cache}):
        layers_of(cache, during)
        raise Stopped


def test_a_call_that_returns_may_leave_layers_with_different_numbers():
    """Cross-attention stores an image once, and text with every call."""
    cache = windowed()
    for during in ((9, 3, 9, 9), (1, 0, 1, 1)):
        with whole_call((), {"past_key_values": cache}):
            layers_of(cache, during)
    cache.check_whole()
