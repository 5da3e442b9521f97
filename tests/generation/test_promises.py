"""What transformers' own tests of caches and generation promise, restated for compressed caches.

Which of them other files cover: the table in docs/generation.md.
"""

import copy

import pytest
import torch

import starkv_compile
from starkv_compile import StarKVCache, StarKVConfig
from starkv_compile.testing import (
    IMAGE_TOKEN,
    LAYERS,
    TinyPrompt,
    generate,
    tiny_inputs,
    tiny_model,
)
from tests.support.crossing import slow

FAMILY, BUDGET = "llava", 0.3
TEXT = TinyPrompt((), 40)
LENGTH, KEPT = 42, StarKVConfig(budget=BUDGET).capacity(42)


@pytest.fixture(name="model", scope="module")
def _model():
    return starkv_compile.compile(tiny_model(FAMILY), budget=BUDGET, inner="eager")


def test_an_answer_in_two_calls_is_the_answer_in_one(model):
    inputs = tiny_inputs(FAMILY)
    whole = generate(model, inputs, tokens=6)
    first = generate(model, inputs, tokens=3)
    rest = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    second = generate(model, rest, tokens=3, past_key_values=first.past_key_values)
    assert torch.equal(second.sequences, whole.sequences)
    for ours, theirs in zip(
        second.past_key_values.layers, whole.past_key_values.layers, strict=True
    ):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.kept, theirs.kept)


@pytest.mark.slow(ci=True)
def test_embeddings_go_on_where_embeddings_ended(model):
    inputs = tiny_inputs(FAMILY, TEXT)
    expected = generate(model, inputs, tokens=6).sequences[0, -6:]
    embed = model.get_input_embeddings()
    with torch.no_grad():
        prompt = embed(inputs["input_ids"])
        first = generate(model, {"inputs_embeds": prompt}, tokens=3)
        longer = torch.cat([prompt, embed(first.sequences[:, -3:])], dim=1)
    second = generate(
        model, {"inputs_embeds": longer}, tokens=3, past_key_values=first.past_key_values
    )
    assert [*first.sequences[0, -3:], *second.sequences[0, -3:]] == expected.tolist()


@pytest.mark.parametrize(
    ("options", "rows"),
    [({}, 1), slow({"num_beams": 3, "num_return_sequences": 2}, 3, ci=True)],
    ids=["greedy", "beams"],
)
def test_format_of_a_cache(model, options, rows):
    """As a full cache's, but for the tokens it has dropped; every tensor in storage of its own."""
    inputs = tiny_inputs(FAMILY, TEXT)
    full = generate(tiny_model(FAMILY), inputs, tokens=3, **options).past_key_values
    cache = generate(model, inputs, tokens=3, **options).past_key_values
    assert len(cache) == len(cache.layers) == LAYERS
    assert cache.get_seq_length() == full.get_seq_length() == LENGTH + 2
    storages = set()
    for ours, theirs in zip(cache.layers, full.layers, strict=True):
        for left, right in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            _, heads, _, width = right.shape
            assert left.shape == (rows, heads, KEPT + 2, width)
            assert (left.dtype, left.device) == (right.dtype, right.device)
            storages.add(left.untyped_storage().data_ptr())
    assert len(storages) == 2 * LAYERS


@pytest.mark.slow(ci=True)
def test_everything_a_call_can_return(model):
    """Hidden states of all tokens; attention of a later token over the tokens that are stored."""
    inputs = tiny_inputs(FAMILY, TEXT)
    options = {"num_beams": 2, "output_hidden_states": True, "output_scores": True}
    full = generate(tiny_model(FAMILY), inputs, tokens=3, **options)
    out = generate(model, inputs, tokens=3, **options)
    assert out.keys() == full.keys()
    assert out.sequences_scores.shape == full.sequences_scores.shape
    assert out.beam_indices.shape == full.beam_indices.shape
    for ours, theirs in zip(out.hidden_states, full.hidden_states, strict=True):
        for left, right in zip(ours, theirs, strict=True):
            assert left.shape == right.shape
    for left, right in zip(out.hidden_states[0], full.hidden_states[0], strict=True):
        assert torch.equal(left, right), "the prompt is computed in full"
    assert torch.equal(out.scores[0], full.scores[0])


@pytest.mark.slow
def test_attention_that_is_returned_is_over_what_is_stored():
    model = tiny_model(FAMILY)
    model.set_attn_implementation("eager")
    starkv_compile.compile(model, budget=BUDGET, inner="eager")
    out = generate(model, tiny_inputs(FAMILY, TEXT), tokens=3, output_attentions=True)
    widths = [[layer.shape[-2:] for layer in step] for step in out.attentions]
    assert widths[0] == [(LENGTH, LENGTH)] * LAYERS
    assert widths[1:] == [[(1, KEPT + i)] * LAYERS for i in (1, 2)]
    for step in out.attentions:
        for layer in step:
            torch.testing.assert_close(layer.sum(-1), torch.ones(layer.shape[:-1]))


@pytest.mark.slow
def test_prompt_lookup_says_what_greedy_says(model):
    inputs = tiny_inputs(FAMILY, TEXT)
    inputs["input_ids"][:, 21:] = inputs["input_ids"][:, :21]
    greedy = generate(tiny_model(FAMILY), inputs, tokens=8).sequences
    with pytest.warns(UserWarning, match="drafted tokens"):
        looked_up = generate(model, inputs, tokens=8, prompt_lookup_num_tokens=3).sequences
    assert torch.equal(looked_up, greedy)


@pytest.mark.slow(ci=True)
def test_extra_padding_on_the_left_changes_nothing():
    model = starkv_compile.compile(tiny_model(FAMILY), budget_tokens=20, inner="eager")
    inputs = tiny_inputs(FAMILY, TEXT)
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (13, 0)),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (13, 0)),
    }
    alone, out = generate(model, inputs), generate(model, padded)
    assert torch.equal(out.sequences[:, 13:], alone.sequences)
    for ours, theirs in zip(out.past_key_values.layers, alone.past_key_values.layers, strict=True):
        assert torch.equal(ours.kept - 13, theirs.kept)
        torch.testing.assert_close(ours.keys, theirs.keys)


@pytest.mark.slow(ci=True)
def test_images_that_do_not_match_their_tokens_are_the_models_own_error(model):
    good = tiny_inputs(FAMILY)
    expected = generate(model, good).sequences
    for images in (1, 3):
        bad = {**good, "pixel_values": good["pixel_values"][:1].repeat(images, 1, 1, 1)}
        with pytest.raises(ValueError, match="mage") as theirs:
            generate(tiny_model(FAMILY), bad)
        with pytest.raises(ValueError, match="mage") as ours:
            generate(model, bad)
        assert str(ours.value) == str(theirs.value)
    assert torch.equal(generate(model, good).sequences, expected)
    assert int((good["input_ids"] == IMAGE_TOKEN).sum()) == 32


@pytest.mark.slow(ci=True)
def test_a_copied_prompt_is_asked_twice(model):
    """A prompt prefilled once; each question gets a deep copy, and the original stays as it was."""
    inputs = tiny_inputs(FAMILY, TEXT)
    cache = StarKVCache(model.config)
    start = generate(model, inputs, tokens=1, past_key_values=cache).sequences
    before = [layer.keys.clone() for layer in cache.layers]

    def ask(words, cache):
        ids = torch.cat([start, torch.tensor([words])], dim=1)
        rest = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return generate(model, rest, past_key_values=cache).sequences

    first, second = (ask(words, copy.deepcopy(cache)) for words in ([9, 8, 7], [50, 60, 70, 80]))
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
    assert torch.equal(ask([50, 60, 70, 80], cache.fork()), second)
    assert torch.equal(ask([9, 8, 7], cache), first)
