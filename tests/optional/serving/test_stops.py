"""Prompts that are compacted while they are read: replies are the same, whatever else happens."""

import pytest

pytest.importorskip("vllm", reason="make test-serving installs vLLM")

from vllm.exceptions import VLLMValidationError

from benchmarks.engines import BLOCK, engine
from starkv_compile.serving import scheduling

STOPS = {"budget": 0.2, "prefill_chunk_size": 96}
"""The prompts have 280 to 480 tokens, so each has two stops or more before its end."""


@pytest.fixture(scope="module")
def replies(folder, asked):
    with engine(folder, STOPS) as fresh:
        return {budget: fresh.tokens(asked[0], budget) for budget in (1.0, 0.5, 0.2)}


def test_it_is_another_set_of_tokens(expected, replies):
    assert replies[1.0] == expected[1.0], "a request that keeps everything has no stops"
    assert replies[0.2] != expected[0.2]


def test_logprobs_of_prompts_are_exact_or_refused(folder, asked):
    def logprobs(made, budget=None):
        found = made.ask(asked[0][:2], budget, tokens=1, prompt_logprobs=0)
        return [
            max(one.logprob for one in step.values())
            for reply in found
            for step in reply.prompt_logprobs[1:]
        ]

    with engine(folder, {"budget": 0.2}) as at_the_end:
        exact = logprobs(at_the_end)
        assert exact == logprobs(at_the_end, 1.0)
    with engine(folder, STOPS) as made:
        assert logprobs(made, 1.0) == exact
        with pytest.raises(VLLMValidationError, match="does not support prompt_logprobs"):
            logprobs(made)


@pytest.mark.parametrize("chunk", [96, 64, 37])
def test_a_schedulers_chunks_change_nothing(folder, asked, replies, chunk):
    with engine(folder, STOPS, max_num_batched_tokens=chunk, max_num_seqs=8) as made:
        assert made.tokens(asked[0]) == replies[0.2]
        assert made.blocks_in_use == 0


def test_the_most_blocks_are_fewer(folder, asked):
    """Each chunk is written beside what stayed of the earlier ones."""
    rule = scheduling.Rule.of(STOPS)
    with engine(folder, STOPS) as made:
        length = len(made.ask(asked[0][:1], tokens=1)[0].prompt_token_ids)
        made.used.clear()
        made.ask(asked[0][:1], tokens=4)
        assert max(made.used) == rule.most_blocks(length, length, BLOCK, None, 0)
        assert max(made.used) < length // BLOCK - 2


def test_prefixes_are_shared_up_to_the_first_stop(folder, asked, replies):
    with engine(folder, STOPS, enable_prefix_caching=True) as made:
        for budget in (0.2, 0.2, 1.0, 0.2, 0.5, 1.0):
            assert made.tokens(asked[0], budget) == replies[budget], budget
        hits = [one.num_cached_tokens for one in made.ask(asked[0])]
        assert set(hits) == {64}, "of the 96 before the first stop, 64 are not written again"


def test_preempted_in_the_middle_of_prompts_and_replies(folder, asked, replies):
    options = {"max_num_seqs": 32, "max_num_batched_tokens": 256}
    with engine(folder, STOPS, **options) as made:
        made.preempt_all_at(3, 9, 20, 30)
        assert made.tokens(asked[0]) == replies[0.2]
        assert made.preempted > len(asked[0])


def test_if_chunks_did_not_end_at_stops(folder, asked):
    """The control: a step that goes on after a stop is an error."""
    with engine(folder, STOPS) as made:
        made.scheduler.need_mamba_block_aligned_split = False
        with pytest.raises(Exception, match="should have been compacted"):
            made.tokens(asked[0][:1])


def test_if_prefixes_were_shared_up_to_the_end(folder, asked, monkeypatch):
    """The control: blocks after the first stop are the prompt's own. A hit there is an error."""
    monkeypatch.setattr(scheduling.Rule, "shared", scheduling.Rule.skip)
    made_of = engine(folder, STOPS, enable_prefix_caching=True)
    with made_of as made, pytest.raises(Exception, match="nothing is known of what"):
        assert [made.tokens(asked[0]) for _ in range(2)]
