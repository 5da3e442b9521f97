"""Bytes: of what is stored, of a token, and of all that was seen."""

import pytest
import torch
from transformers import DynamicCache

from starkv_compile import StarKVCache
from starkv_compile.cache.size import (
    cache_bytes,
    full_bytes,
    layer_bytes,
    layer_stats,
    token_bytes,
)
from starkv_compile.kernels.reference.quantization import TokenBytes
from starkv_compile.testing import LAYERS, tiny_model

ROWS, HEADS, DIM = 2, 2, 16
TOKEN = ROWS * 2 * HEADS * DIM * 4  # rows, keys and values, KV heads, head dim, float32
SEEN, KEPT, ROOM = 68, 20, 64


def feed(cache, tokens):
    for layer in range(LAYERS):
        key = torch.randn(ROWS, HEADS, tokens, DIM)
        cache.update(key, key, layer)


@pytest.fixture(name="cache")
def _cache():
    """A prompt, of which 20 tokens are kept."""
    cache = StarKVCache(tiny_model("llava").config)
    feed(cache, SEEN)
    for layer in cache.compressed_layers:
        layer.keep_only(torch.arange(KEPT))
    return cache


def decode(cache, tokens):
    for _ in range(tokens):
        cache.begin_step(ROOM)
        feed(cache, 1)
        cache.end_step(written=True)


def test_a_token_takes_the_same_in_a_buffer_with_free_slots(cache):
    assert (full_bytes(cache.compressed_layers), cache.full_nbytes) == (LAYERS * SEEN * TOKEN,) * 2
    decode(cache, 3)
    layer = cache.layers[0]
    assert (layer.stored, layer.keys.shape[2], layer.seen) == (KEPT + 3, KEPT + ROOM, SEEN + 3)
    assert token_bytes(layer) == TOKEN
    assert cache.full_nbytes == LAYERS * (SEEN + 3) * TOKEN


def test_stored_bytes_count_the_free_slots(cache):
    assert layer_bytes(cache.layers[0]) == KEPT * TOKEN
    decode(cache, 3)
    assert layer_bytes(cache.layers[0]) == (KEPT + ROOM) * TOKEN
    assert cache_bytes(cache) == cache.nbytes == LAYERS * (KEPT + ROOM) * TOKEN


def test_a_layer_in_a_report(cache):
    decode(cache, 1)
    for layer in layer_stats(cache.compressed_layers):
        assert (layer.stored, layer.seen) == (KEPT + 1, SEEN + 1)
        assert (layer.nbytes, layer.token_bytes) == ((KEPT + ROOM) * TOKEN, TOKEN)
        assert layer.full_nbytes == (SEEN + 1) * TOKEN


def test_an_empty_cache_takes_nothing():
    cache = StarKVCache(tiny_model("llava").config)
    assert (cache.nbytes, cache.full_nbytes, layer_stats(cache.compressed_layers)) == (0, 0, [])


def test_a_cache_of_the_library():
    cache = DynamicCache()
    feed(cache, 5)
    assert cache_bytes(cache) == LAYERS * 5 * TOKEN


def test_keys_and_values_of_different_widths():
    """As multi-head latent attention stores them."""
    key, value = torch.zeros(3, 1, 7, 12), torch.zeros(3, 1, 7, 8, dtype=torch.bfloat16)
    sizes = TokenBytes.of(key, value, 4)
    assert sizes == (12 * 4 + 8 * 2, 6 + 4 + 4 + 4, (12 + 8) * 4)
