"""What a caller's cache becomes, and what a coming chunk does to it."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from starkv_compile import CacheError, StarKVCache, compile
from starkv_compile.cache.cache import ready_cache
from starkv_compile.cache.chunk import begin_chunk, drafted_tokens
from starkv_compile.testing import LAYERS, tiny_model

MODEL = tiny_model("llava")
TEXT = {"input_ids": torch.arange(10, 30)[None]}


def feed(cache, tokens):
    for layer in range(LAYERS):
        cache.update(torch.zeros(1, 2, tokens, 16), torch.zeros(1, 2, tokens, 16), layer)


def test_caches_that_become_one_of_ours():
    assert isinstance(ready_cache(MODEL.config, None), StarKVCache)
    ours, stock = StarKVCache(MODEL.config), DynamicCache()
    assert ready_cache(MODEL.config, ours) is ours
    assert ready_cache(MODEL.config, stock) is stock
    assert isinstance(stock, StarKVCache)


def test_caches_that_cannot_become_one():
    full, offloaded = DynamicCache(), DynamicCache()
    feed(full, 3)
    offloaded.offloading = True
    static = StaticCache(MODEL.config.get_text_config(), max_cache_len=9)
    for cache in (full, offloaded, static):
        kind = type(cache)
        assert ready_cache(MODEL.config, cache) is None
        assert type(cache) is kind


def read(cache):
    """Where the turn starts that 20 more tokens are of."""
    begin_chunk(cache, MODEL, TEXT)
    feed(cache, 20)
    return int(cache.shared.turn_start)


def test_chunks_without_a_reply_between_them_are_of_one_turn():
    cache = StarKVCache(MODEL.config)
    assert [read(cache), read(cache)] == [0, 0]
    cache.begin_turn()  # as a call does that brings one token
    assert [read(cache), read(cache), read(cache.fork())] == [40, 40, 40]
    begin_chunk(cache, MODEL, TEXT)  # a call that stopped before it stored anything
    assert read(cache) == 40
    cache.crop(-5)
    assert [read(cache), read(cache)] == [95, 95]
    begin_chunk(cache, MODEL, {**TEXT, "logits_to_keep": 4})
    feed(cache, 20)
    assert [read(cache), read(cache)] == [155, 155]
    again = StarKVCache(MODEL.config)
    again.load_state_dict(cache.state_dict())
    assert read(again) == 195
    cache.reset()
    assert [read(cache), read(cache)] == [0, 0]


@pytest.mark.slow(ci=True)
def test_a_token_of_a_reply_ends_the_turn():
    model = compile(tiny_model("llava"), budget=0.5, inner="eager")
    cache = StarKVCache(model.config)
    starts = []
    for tokens in (20, 20, 1, 20, 20):
        model(input_ids=TEXT["input_ids"][:, :tokens], past_key_values=cache)
        starts.append(int(cache.shared.turn_start))
    assert starts == [0, 0, 0, 41, 41]


def test_a_turn_may_end_in_a_frame():
    """The frame that the next turn begins with is another one."""
    cache = StarKVCache(MODEL.config)
    image = {"input_ids": torch.full((1, 16), MODEL.config.image_token_id)}
    begin_chunk(cache, MODEL, image)
    feed(cache, 16)
    cache.begin_turn()
    begin_chunk(cache, MODEL, image)
    assert cache.shared.layout.frame.max() == 1


@pytest.mark.parametrize(
    ("wanted", "drafts"), [(None, 0), (0, 0), (1, 0), (4, 3), (torch.tensor([2, 3]), 0)]
)
def test_drafts_are_what_logits_are_wanted_of(wanted, drafts):
    assert drafted_tokens({"logits_to_keep": wanted}) == drafts


def test_a_chunk_with_drafts_is_stored_as_it_is():
    cache = StarKVCache(MODEL.config)
    assert begin_chunk(cache, MODEL, {**TEXT, "logits_to_keep": 4}) == 3
    assert cache.shared.appending
    assert cache.shared.layout.seen == 20
    assert begin_chunk(cache, MODEL, TEXT) == 0
    assert not cache.shared.appending


def test_drafts_with_a_prompt_that_was_seen_are_an_error():
    cache = StarKVCache(MODEL.config)
    feed(cache, 20)
    again = {**TEXT, "logits_to_keep": 4, "position_ids": torch.arange(20)[None]}
    with pytest.raises(CacheError, match="but the cache has seen 20 tokens"):
        begin_chunk(cache, MODEL, again)
    again["position_ids"] = again["position_ids"] + 20
    assert begin_chunk(cache, MODEL, again) == 3
