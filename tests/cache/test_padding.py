"""Calls on a short cache that count tokens by what it stores, or hide others than the prompt."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import starkv_compile
from starkv_compile import CacheError, StarKVCache
from tests.foreign.core import PROMPT, filled
from tests.foreign.styles import LLAMA
from tests.support.crossing import slow

SEEN, STORED = PROMPT.shape[1], PROMPT.shape[1] * 3 // 10
TOKEN = PROMPT[:, :1]


@pytest.fixture(scope="module")
def model():
    model = filled(LlamaForCausalLM(LlamaConfig(**LLAMA)))
    yield starkv_compile.compile(model, budget=0.3, inner="eager")
    starkv_compile.undo(model)


@torch.no_grad()
def call(model, ids, cache=None, hidden=None, **named):
    """hidden: places of the mask that are zero."""
    if hidden is not None:
        seen = 0 if cache is None else cache.get_seq_length()
        named["attention_mask"] = torch.ones(len(ids), seen + ids.shape[1], dtype=torch.int64)
        named["attention_mask"][:, hidden] = 0
    return model(ids, past_key_values=cache, **named)


@pytest.fixture
def cache(model):
    cache = call(model, PROMPT).past_key_values
    assert (cache.get_seq_length(), cache.layers[0].stored) == (SEEN, STORED)
    return cache


@pytest.mark.parametrize("ids", [slow(TOKEN, ci=True), PROMPT[:, :5]], ids=["a token", "a prompt"])
def test_a_mask_as_long_as_what_is_stored(model, cache, ids):
    mask = torch.ones(1, STORED + ids.shape[1])
    with pytest.raises(CacheError, match=f"for each token seen: {SEEN + ids.shape[1]}"):
        call(model, ids, cache, attention_mask=mask)
    call(model, ids, cache, hidden=[])


@pytest.mark.parametrize("ids", [TOKEN, slow(PROMPT[:, :5], ci=True)], ids=["a token", "a prompt"])
def test_positions_that_go_on_from_what_is_stored(model, cache, ids):
    places = torch.arange(ids.shape[1])[None]
    with pytest.raises(CacheError, match=f"begin at {STORED}.*tokens seen, {SEEN}"):
        call(model, ids, cache, position_ids=STORED + places)
    whole = call(model, ids, cache.fork()).logits
    right = call(model, ids, cache, position_ids=cache.get_seq_length() + places).logits
    assert torch.equal(right, whole)


@pytest.mark.parametrize(
    "hidden", [[0, 1], slow([20, 21], ci=True)], ids=["at the left", "in the middle"]
)
def test_a_mask_that_hides_what_the_prompt_saw(model, cache, hidden):
    with pytest.raises(CacheError, match="cannot hide"):
        call(model, TOKEN, cache, hidden)
    call(model, TOKEN, cache, [])


@pytest.mark.slow(ci=True)
def test_padding_stays_what_it_was(model):
    rows, padding = PROMPT.expand(2, -1), [0, 1, 2]
    cache = call(model, rows, hidden=padding).past_key_values
    with pytest.raises(CacheError, match=r"hides \[0, 0\] tokens at the left"):
        call(model, rows[:, :1], cache, [])
    loaded = StarKVCache(model.config)
    loaded.load_state_dict(cache.state_dict())
    for twin in (loaded, cache.fork(), cache):
        call(model, rows[:, :1], twin, padding)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.shared.padding.tolist() == [3]
    cache.batch_repeat_interleave(2)
    assert cache.shared.padding.tolist() == [3, 3]
    call(model, rows[:, :1], cache, padding)
    place = torch.full((2, 1), cache.get_seq_length() - 3)
    call(model, rows[:, :1], cache, padding, position_ids=place)


@pytest.mark.parametrize("inner", [slow("eager", ci=True), slow("inductor")])
def test_a_mask_of_one_column_for_all_keys(inner):
    """It shows every key to every query, as one with a column for each does."""
    model = filled(LlamaForCausalLM(LlamaConfig(**LLAMA)))
    starkv_compile.compile(model, budget=0.3, inner=inner)
    whole = torch.ones(1, 1, 1, SEEN, dtype=torch.bool)
    expected, found = (
        call(model, PROMPT, StarKVCache(model.config), attention_mask=mask)
        for mask in (whole, whole[..., :1])
    )
    torch.testing.assert_close(found.logits, expected.logits)
    for ours, theirs in zip(
        found.past_key_values.layers, expected.past_key_values.layers, strict=True
    ):
        assert ours.stored == STORED
        assert torch.equal(ours.kept, theirs.kept)
    starkv_compile.undo(model)


@pytest.mark.slow(ci=True)
def test_a_position_that_is_right_by_chance(model):
    """All rows are padded by as many tokens as are dropped."""
    padding = list(range(SEEN - STORED))
    cache = call(model, PROMPT, hidden=padding).past_key_values
    stored = cache.layers[0].stored
    place = torch.tensor([[SEEN - len(padding)]])
    assert (stored, int(place)) == (STORED, STORED)
    call(model, TOKEN, cache, padding, position_ids=place)
