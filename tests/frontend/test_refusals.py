"""Why a prompt is left uncompressed: each reason alone, and which one wins."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.continuous_batching import PagedAttentionCache

from starkv_compile import StarKVCache
from starkv_compile.frontend.refusals import REFUSALS, PromptCall, first_refusal
from starkv_compile.testing import tiny_model

CONFIG = tiny_model("llava").config
PLAIN = torch.ones(1, 8, dtype=torch.int64)


def model(training=False, form="sdpa", use_cache=True, layers=2):
    config = PreTrainedConfig()
    config.use_cache, config._attn_implementation = use_cache, form
    if layers:
        config.num_hidden_layers = layers
    return SimpleNamespace(training=training, config=config, _supports_attention_backend=True)


def holding_tokens(cache):
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), layer)
    return cache


def beside_another_kind():
    cache = StarKVCache(CONFIG)
    cache.layers[1] = DynamicLayer()
    return cache


def call(cache=None, uneven=False, of=None, declared=True, **named):
    return PromptCall(of or model(), named, cache, uneven, declared, "cache")


CASES = {
    "in_training": (call(of=model(training=True)), r"call model\.eval\(\) first"),
    "other_cache": (
        call(StaticCache(CONFIG.get_text_config(), max_cache_len=9)),
        "the cache is a StaticCache, which starkv cannot shorten",
    ),
    "cross_attention": (call(encoder_hidden_states=torch.ones(1, 2, 3)), "attends to an encoder"),
    "without_cache": (call(use_cache=False), "there is no cache to compress"),
    "packed_rows": (call(position_ids=torch.arange(8)[None] % 4), "packed into one row"),
    "uneven_padding": (call(uneven=True, attention_mask=PLAIN - 1), "and of padding"),
    "uneven_attention": (
        call(uneven=True, of=model(form="flash")),
        "and flash takes no mask for that",
    ),
    "undeclared_cache": (
        call(declared=False),
        r"pass cache=starkv_compile\.StarKVCache\(model\.config\)",
    ),
    "unknown_windows": (
        call(DynamicCache(), of=model(layers=0)),
        r"pass cache=starkv_compile\.StarKVCache\(PreTrainedConfig\(num_hidden_layers",
    ),
    "foreign_tokens": (call(holding_tokens(DynamicCache())), "the DynamicCache passed in already"),
    "other_layers": (call(beside_another_kind()), "in a DynamicLayer, which starkv cannot shorten"),
    "drafted_prompt": (call(logits_to_keep=4), "drafted tokens"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_reason_alone(name):
    case, said = CASES[name]
    refusal, reason = first_refusal(case)
    assert refusal.__name__ == name
    assert [other for other in REFUSALS if other(case)] == [refusal]
    assert re.search(said, reason)


def test_every_reason_has_its_case():
    assert [refusal.__name__ for refusal in REFUSALS] == list(CASES)


def test_the_first_reason_wins():
    """A call with everything wrong, of which one thing after the other is put right."""
    wrong = {
        "of": model(training=True, form="flash", layers=0),
        "declared": False,
        "cache": StaticCache(CONFIG.get_text_config(), max_cache_len=9),
        "encoder_hidden_states": torch.ones(1, 2, 3),
        "use_cache": False,
        "position_ids": torch.arange(8)[None] % 4,
        "logits_to_keep": 4,
    }
    remedies = [
        {"of": model(form="flash", layers=0)},
        {"cache": None},
        {"encoder_hidden_states": None},
        {"use_cache": True},
        {"position_ids": None, "attention_mask": PLAIN - 1},
        {"attention_mask": PLAIN},
        {"of": model(layers=0)},
        {"cache": holding_tokens(DynamicCache())},
        {"of": model()},
        {"cache": beside_another_kind()},
        {"cache": DynamicCache()},
        {"logits_to_keep": 1},
    ]
    won = []
    for remedy in remedies:
        refusal, _ = first_refusal(call(uneven=True, **wrong))
        won.append(refusal)
        wrong |= remedy
    assert tuple(won) == REFUSALS
    assert first_refusal(call(uneven=True, **wrong)) is None


@pytest.mark.parametrize(
    "case",
    [
        call(),
        call(DynamicCache()),
        call(StarKVCache(CONFIG)),
        call(holding_tokens(StarKVCache(CONFIG))),
        call(holding_tokens(StarKVCache(CONFIG)), logits_to_keep=4),
        call(position_ids=torch.arange(8)[None], attention_mask=PLAIN, logits_to_keep=1),
        call(attention_mask=PLAIN - 1, of=model(form="flash")),
        call(uneven=True, attention_mask=PLAIN),
    ],
)
def test_what_is_compressed(case):
    assert first_refusal(case) is None


def test_the_cache_of_continuous_batching_is_named():
    """It comes with use_cache=False, which is not the reason."""
    paged = object.__new__(PagedAttentionCache)
    _, reason = first_refusal(call(paged, use_cache=False))
    assert "call model.generate in place of generate_batch" in reason


def test_an_offloaded_cache_is_named():
    cache = DynamicCache()
    cache.offloading = True
    _, reason = first_refusal(call(cache))
    assert reason.startswith("the cache is a DynamicCache with offloading, which")


def test_a_model_whose_configuration_wants_no_cache():
    _, reason = first_refusal(call(of=model(use_cache=False)))
    assert reason.startswith("use_cache=False")
    assert first_refusal(call(of=model(use_cache=False), use_cache=True)) is None
