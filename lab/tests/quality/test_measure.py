"""The instrument on the demo agent, with prompts of one frame."""

import pytest
import torch
from starkv_lab.agent.vocabulary import END, PAD, TOKEN_ID
from starkv_lab.quality import readers
from starkv_lab.quality.design import Design
from starkv_lab.quality.measure import Bench
from starkv_lab.quality.variants import FULL, SCREEN, VARIANTS

from starkv_compile import StarKVCache, StarKVConfig


@pytest.fixture(scope="module")
def bench():
    return Bench(Design.of(1, frames=(1,)))


@pytest.mark.slow
def test_the_full_cache_is_the_reference(bench):
    cell = bench.measure(FULL, 1.0)
    assert cell.same.all()
    assert max(cell.kl.values()) < 1e-5
    assert (cell.recall, cell.nbytes) == (1.0, cell.full_nbytes)
    assert cell.right.mean() > 0.97


@pytest.mark.slow
def test_an_oracle_loses_nothing_at_its_size_and_more_the_less_it_keeps(bench):
    """12 elements, the question and the window are less than a quarter of these prompts."""
    full = bench.measure(FULL, 1.0)
    cells = [bench.measure(VARIANTS["oracle"], budget) for budget in (0.25, 0.12)]
    assert cells[0].right.mean() >= full.right.mean() - 0.02
    assert cells[1].right[:, 1].mean() > 0.9, "what was asked is kept first"
    assert cells[1].right[:, 2:].mean() < 0.7, "what others need is not all kept"


@pytest.mark.slow
def test_policies_keep_as_many_bytes_and_less_of_the_answers(bench):
    paper, random = (bench.measure(VARIANTS[name], 0.25) for name in ("paper", "random"))
    oracle = bench.measure(VARIANTS["oracle"], 0.25)
    assert paper.nbytes == random.nbytes == oracle.nbytes
    assert paper.nbytes / paper.full_nbytes == pytest.approx(0.25, abs=0.01)
    assert random.right.mean() < paper.right.mean() < oracle.right.mean()
    assert random.recall < paper.recall < 1
    assert paper.kl["other"] > 0.1


def test_a_token_at_a_time_is_the_same(bench, monkeypatch):
    """What layers of different lengths need, on a cache that could be asked either way."""
    seen = bench.batches[2].seen
    cache, what = bench.reader.read(seen), seen.prompts.continuations[3]
    at_once = bench.reader.go_on(cache, seen, what)
    monkeypatch.setattr(StarKVCache, "is_uneven", True)
    one_by_one = bench.reader.go_on(cache, seen, what)
    torch.testing.assert_close(one_by_one, at_once, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_layers_of_different_lengths(bench):
    cells = [bench.measure(VARIANTS[name], 0.25) for name in ("pyramidkv", "snapkv")]
    assert abs(cells[0].nbytes / cells[1].nbytes - 1) < 0.05
    assert 0.2 < cells[0].right.mean() < 0.97


@pytest.mark.slow(ci=True)
def test_right_is_what_greedy_decoding_says(bench):
    """Judged in one pass over the right answer; `generate` token by token must agree."""
    config = StarKVConfig.paper(budget=0.15, inner="eager")
    seen = bench.batches[1].seen
    prompts, reply = seen.prompts, seen.prompts.continuations[0]
    with bench.reader.compiled(config) as compressor:
        judged = bench._judge(bench.batches[1], compressor.read(seen), 0)
        model = compressor.model
        told = model.generate(
            input_ids=prompts.input_ids,
            attention_mask=torch.ones_like(prompts.input_ids),
            mm_token_type_ids=prompts.is_image.int(),
            pixel_values=seen.features,
            image_grid_thw=prompts.screens.grid_thw,
            past_key_values=StarKVCache(model.config),
            max_new_tokens=reply.ids.shape[1],
            do_sample=False,
            eos_token_id=TOKEN_ID[END],
            pad_token_id=TOKEN_ID[PAD],
        )[:, prompts.input_ids.shape[1] :]
    told = torch.nn.functional.pad(told, (0, reply.ids.shape[1] - told.shape[1]))
    assert judged.right.tolist() == (told == reply.ids).all(1).tolist()
    assert 0 < judged.right.sum() < len(judged.right), "some of each, or nothing was compared"


@pytest.mark.slow
def test_a_prompt_in_chunks(bench):
    names = ("default", *(f"screen_novelty-chunk-{n}" for n in (150, 50)))
    whole, one, several = (bench.measure(VARIANTS[name], 0.25) for name in names)
    assert (one.right == whole.right).all(), "the whole prompt is shorter than a chunk"
    assert one.recall == pytest.approx(whole.recall)
    assert several.nbytes == whole.nbytes
    assert several.recall != pytest.approx(whole.recall)


@pytest.mark.slow
def test_screens_one_at_a_time_are_the_whole_prompt():
    reader, seen = (bench := Bench(Design.of(1, frames=(3,)))).reader, bench.batches[0].seen
    whole, parts = reader.read(seen), readers._read(reader.plain, seen, SCREEN)
    for one, other in zip(whole.layers, parts.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
        torch.testing.assert_close(one.values, other.values)
