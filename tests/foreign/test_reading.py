"""Models that read stored keys, make a mask late, or have a layer that nobody can read."""

import warnings

import pytest
import torch
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

import starkv_compile
from starkv_compile import CacheError
from tests.foreign.core import DIM, LAYERS, PROMPT, filled, oracle, places_of
from tests.foreign.styles import LibraryCache, MaskFromCache
from tests.support.crossing import slow

WHOLE = PROMPT.shape[1]
SHORT = WHOLE * 3 // 10
LATER = PROMPT[:, :9].contiguous()
COUNTS_KEYS = "the model reads the keys or values of a layer before"


class CountsKeys(LibraryCache):
    """Its next position is the number of keys that the first layer stores."""

    def start(self, cache):
        keys = cache.layers[0].keys if cache.layers else None
        return 0 if keys is None else keys.shape[2]


class CountsEachLayersKeys(LibraryCache):
    """Each layer looks at its own values before it stores others."""

    def store(self, cache, k, v, i):
        if cache.layers and cache.layers[i].values is not None:
            assert cache.layers[i].values.shape[2] >= 0
        return cache.update(k, v, i)


class CountsKeysLater(CountsKeys):
    """It looks at the keys only if the cache has seen tokens."""

    def start(self, cache):
        return super().start(cache) if cache.get_seq_length() else 0


class CountsKeysOfTheLast(LibraryCache):
    """It looks at the last layer's keys when the first has stored its tokens."""

    def store(self, cache, k, v, i):
        if i == LAYERS - 1:
            assert cache.layers[i].keys is None
        return cache.update(k, v, i)


class KeysFromLayer(LibraryCache):
    """Attention takes keys and values from the layer of the cache, after the update."""

    def store(self, cache, k, v, i):
        cache.update(k, v, i)
        return cache.layers[i].keys, cache.layers[i].values


class MaskLater(LibraryCache):
    """None in the first prompt, then one with a column for each token seen, as transformers made
    them before 4.48 (`_prepare_4d_causal_attention_mask_for_sdpa`)."""

    def mask(self, cache, seen, n):
        return torch.full((n, seen + n), -1e9).triu(seen + 1)[None, None] if seen else None


class SlicedMaskLater(MaskLater):
    """The same, cut to the number of keys at hand."""

    def mask(self, cache, seen, n):
        return None if seen and n == 1 else super().mask(cache, seen, n)

    def attend(self, q, k, v, mask):
        if mask is None:
            return super().attend(q, k, v, None)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[..., : k.shape[2]])


def made(kind, budget=0.3):
    torch._dynamo.reset()
    model = filled(kind(PreTrainedConfig(num_hidden_layers=LAYERS)))
    return model if budget is None else starkv_compile.compile(model, budget=budget, inner="eager")


def talked(kind):
    """The talk with a compiled model, and starkv's warnings."""
    model = made(kind)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        talk = kind.talk(model, model)
    return talk, [str(warning.message) for warning in caught if "starkv" in str(warning.message)]


@pytest.mark.parametrize("kind", [CountsKeys, CountsEachLayersKeys])
def test_a_model_that_reads_stored_keys_stays_uncompressed(kind):
    talk, (said,) = talked(kind)
    model = made(kind, None)
    with torch.no_grad():
        plain = kind.talk(model, model)
    assert torch.equal(talk.logits, plain.logits)
    assert COUNTS_KEYS in said
    assert "take positions from cache.get_seq_length()" in said  # what LibraryCache does


@pytest.mark.parametrize("kind", [CountsKeysLater, slow(CountsKeysOfTheLast, ci=True)])
def test_it_raises_once_tokens_are_dropped(kind):
    with pytest.raises(CacheError, match=f"{COUNTS_KEYS}.*take positions from"):
        talked(kind)


def test_keys_may_be_read_after_the_call_and_the_cache_goes_on():
    model = made(LibraryCache)
    with torch.no_grad():
        cache = model(PROMPT).past_key_values
        assert [layer.keys.shape[2] for layer in cache.layers] == [SHORT] * LAYERS
        model(LATER[:, :1], cache)
    assert [layer.values.shape[2] for layer in cache.layers] == [SHORT + 1] * LAYERS


def test_a_cache_that_was_read_keeps_every_token_until_it_is_reset():
    model = made(CountsKeys)
    with torch.no_grad(), pytest.warns(UserWarning, match=COUNTS_KEYS):
        cache = model(PROMPT).past_key_values
    assert cache.fork().shared.is_read
    cache.reset()
    assert not cache.shared.is_read


def test_attention_that_reads_the_layer_is_compressed():
    talk, said = talked(KeysFromLayer)
    assert not said
    assert [key.shape[2] for key, _ in talk.stored] == [SHORT] * LAYERS
    model = made(KeysFromLayer, None)
    tokens, logits = oracle(model, PROMPT, places_of(model, PROMPT, talk.stored))
    assert talk.tokens == tokens
    torch.testing.assert_close(talk.logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [MaskLater, slow(SlicedMaskLater, ci=True)])
def test_a_mask_of_all_tokens_seen_that_comes_later_is_an_error(kind):
    model = made(kind)
    with torch.no_grad():
        cache = model(PROMPT).past_key_values
        assert cache.layers[0].stored == SHORT
        with pytest.raises(CacheError, match=r"column for each token seen.*Give each prompt a new"):
            model(LATER, cache)
        assert model(LATER).past_key_values.layers[0].stored < LATER.shape[1]


def test_and_so_is_one_that_comes_with_the_first_decoded_token():
    with pytest.raises(CacheError, match=r"stores 12 of 40.*create_causal_mask"):
        talked(MaskLater)


def test_other_errors_of_the_model_stay_as_they_are():
    class Broken(LibraryCache):
        def mask(self, cache, seen, n):
            if seen:
                raise RuntimeError("no such size")

    with pytest.raises(RuntimeError, match="no such size") as raised:
        talked(Broken)
    assert not isinstance(raised.value, CacheError)


class OddLayer(MaskFromCache):
    """One layer's attention is none that starkv can read; there is one mask for all."""

    odd = 0

    def store(self, cache, k, v, i):
        self.layer = i
        return cache.update(k, v, i)

    def attend(self, q, k, v, mask):
        if self.layer != self.odd:
            return super().attend(q, k, v, mask)
        return (q @ k.mT * DIM**-0.5).masked_fill(~mask, -1e9).softmax(-1).sqrt() @ v


class LastLayerOdd(OddLayer):
    odd = LAYERS - 1


@pytest.mark.parametrize("kind", [OddLayer, slow(LastLayerOdd, ci=True)])
def test_all_layers_of_one_mask_stay_whole_or_none(kind):
    talk, said = talked(kind)
    model = made(kind, None)
    with torch.no_grad():
        plain = kind.talk(model, model)
    assert torch.equal(talk.logits, plain.logits)
    assert "another layer keeps every token" in said[0]
    assert "torch.nn.functional.scaled_dot_product_attention" in said[0]  # as in MaskFromCache
    talk, said = talked(MaskFromCache)
    assert not said
    assert [key.shape[2] for key, _ in talk.stored] == [SHORT] * LAYERS


class OddGraph(OddLayer):
    """The same, in graphs of their own."""

    def forward(self, input_ids=None, past_key_values: Cache | None = None):
        if past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen, n, x = self.start(past_key_values), input_ids.shape[1], self.embed(input_ids)
        mask = self.mask(past_key_values, seen, n)
        first, second = self.layers
        q, k, v = first.rotated(x, seen + torch.arange(n))
        k, v = past_key_values.update(k, v, 0)
        causal = True if mask is None and n > 1 else False  # noqa: SIM210
        x = first.rest(x, F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal))
        torch._dynamo.graph_break()  # in a loop, Dynamo would not compile the layers at all
        q, k, v = second.rotated(x, seen + torch.arange(n))
        k, v = past_key_values.update(k, v, 1)
        mask = torch.ones(n, k.shape[2], dtype=torch.bool).tril(k.shape[2] - n)
        x = second.rest(x, (q @ k.mT).masked_fill(~mask, -1e9).softmax(-1).sqrt() @ v)
        return CausalLMOutputWithPast(logits=self.head(x), past_key_values=past_key_values)


class OddGraphNoMask(OddGraph):
    def mask(self, cache, seen, n):
        return None


def prompted(kind):
    """A compiled model, and its cache of a prompt whose layers differ."""
    model = made(kind)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"layers \[1\] keep every token"):
        cache = model(PROMPT).past_key_values
    assert [layer.stored for layer in cache.layers] == [SHORT, WHOLE]
    assert cache.is_uneven
    return model, cache


@pytest.mark.slow(ci=True)
def test_a_mask_for_layers_of_different_lengths_is_an_error():
    model, cache = prompted(OddGraph)
    for ids in (LATER[:, :1].contiguous(), LATER):
        with torch.no_grad(), pytest.raises(CacheError, match="because one of them could not be"):
            model(ids, cache)
    starkv_compile.undo(model)
    with torch.no_grad(), pytest.raises(CacheError, match="one mask for all layers"):
        model(LATER[:, :1].contiguous(), cache)


@pytest.mark.slow(ci=True)
def test_a_token_without_a_mask_sees_layers_of_different_lengths():
    model, cache = prompted(OddGraphNoMask)
    with torch.no_grad():
        model(LATER[:, :1].contiguous(), cache)
        assert [layer.stored for layer in cache.layers] == [SHORT + 1, WHOLE + 1]
        with pytest.raises(CacheError, match="takes one token at a time"):
            model(LATER, cache)
        cache.reset()
        model(LATER, cache)


class SharesKeys(LibraryCache):
    """The second layer reads the keys and values of the first, from the cache."""

    breaks = False

    def forward(self, input_ids=None, past_key_values: Cache | None = None):
        if past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen, n, x = self.start(past_key_values), input_ids.shape[1], self.embed(input_ids)
        first, second = self.layers
        q, k, v = first.rotated(x, seen + torch.arange(n))
        x = first.rest(x, self.attend(q, *past_key_values.update(k, v, 0), None))
        if self.breaks:
            torch._dynamo.graph_break()
        q, _, _ = second.rotated(x, seen + torch.arange(n))
        shared = past_key_values.layers[0]
        x = second.rest(x, self.attend(q, shared.keys, shared.values, None))
        return CausalLMOutputWithPast(logits=self.head(x), past_key_values=past_key_values)


class SharesKeysLater(SharesKeys):
    breaks = True


@pytest.mark.parametrize("kind", [slow(SharesKeys), SharesKeysLater])
def test_keys_that_another_layer_shares(kind):
    """In one graph that is right; in a later one the keys would be compressed already."""
    model = made(kind)
    with torch.no_grad():
        if kind.breaks:
            with pytest.raises(CacheError, match="in a later graph of the call that stored them"):
                model(PROMPT)
            return
        logits = model(PROMPT).logits
        torch.testing.assert_close(logits, made(kind, None)(PROMPT).logits)


class Latents(LibraryCache):
    """Its cache has no heads: [B, tokens, size]."""

    def store(self, cache, k, v, i):
        k, v = cache.update(*(t.transpose(1, 2).flatten(2) for t in (k, v)), i)
        return [t.unflatten(-1, (4, DIM)).transpose(1, 2) for t in (k, v)]


def test_latents_without_heads_stay_uncompressed_and_are_counted():
    model, plain = made(Latents), made(Latents, None)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="keep every token"):
            cache = model(PROMPT).past_key_values
        stock = plain(PROMPT).past_key_values
        for ids in (LATER[:, :1], LATER[:, 1:2]):
            a, b = model(ids.contiguous(), cache), plain(ids.contiguous(), stock)
            torch.testing.assert_close(a.logits, b.logits)
    assert [layer.stored for layer in cache.layers] == [WHOLE + 2] * LAYERS
    cache.crop(-2)
    assert cache.layers[0].keys.shape[1] == cache.get_seq_length() == WHOLE


class Captioner(LibraryCache):
    """It puts an image of 36 tokens in front of the text."""

    def forward(self, input_ids=None, past_key_values: Cache | None = None, image=None):
        if past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen, x = self.start(past_key_values), self.embed(input_ids)
        if image is not None:
            x = torch.cat([image, x], 1)
        places = seen + torch.arange(x.shape[1])
        for i, layer in enumerate(self.layers):
            q, k, v = layer.rotated(x, places)
            x = layer.rest(x, self.attend(q, *past_key_values.update(k, v, i), None))
        return CausalLMOutputWithPast(logits=self.head(x), past_key_values=past_key_values)


@pytest.mark.parametrize("cache", [None, slow("stock")])
def test_an_image_beside_one_token_of_text_is_a_prompt(cache):
    model = made(Captioner)
    given = None if cache is None else DynamicCache(config=model.config)
    image = torch.randn(1, 36, model.embed.embedding_dim)
    with torch.no_grad():
        cache = model(PROMPT[:, :1], given, image=image).past_key_values
        assert [layer.stored for layer in cache.layers] == [37 * 3 // 10] * LAYERS
        model(PROMPT[:, 1:2], cache)
    assert [layer.stored for layer in cache.layers] == [37 * 3 // 10 + 1] * LAYERS


def test_a_forward_that_was_replaced_has_its_own_arguments():
    """Kernels for training put a function of their own on the model."""
    model = filled(LibraryCache(PreTrainedConfig(num_hidden_layers=LAYERS)))
    plain = model.forward

    def replaced(past_key_values=None, input_ids=None, skip_logits=None):
        assert skip_logits
        return plain(input_ids, past_key_values)

    torch._dynamo.reset()
    model.forward = replaced
    starkv_compile.compile(model, budget=0.3, inner="eager")
    with torch.no_grad():
        cache = model(None, PROMPT, skip_logits=True).past_key_values
    assert [layer.stored for layer in cache.layers] == [SHORT] * LAYERS


class TakesMask(LibraryCache):
    """A model of one's own with the library's names, and an attention of its own."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values: Cache | None = None):
        if attention_mask is not None:
            assert attention_mask.dim() == 2
        return super().forward(input_ids, past_key_values)


def test_layers_of_different_lengths_need_an_attention_of_the_library():
    model = filled(TakesMask(PreTrainedConfig(num_hidden_layers=LAYERS)))
    starkv_compile.compile(model, budget=0.3, inner="eager", policy="pyramidkv")
    mask = torch.ones_like(PROMPT)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="takes no attention_mask that fits them all"):
            cache = model(PROMPT, mask).past_key_values
        model(LATER[:, :1].contiguous(), torch.ones(1, WHOLE + 1), cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [WHOLE + 1] * LAYERS
