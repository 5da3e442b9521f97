"""Each safeguard taken out: the scenarios that it is for must then go wrong."""

import pytest

pytest.importorskip("vllm", reason="make test-serving installs vLLM")

from benchmarks.engines import engine
from starkv_compile.serving import plan, scheduling

BUDGET = {"budget": 0.2}


def differ(found, wanted):
    return sum(a != b for a, b in zip(found, wanted, strict=True))


def through_one_prefix_cache(folder, asked, expected):
    with engine(folder, BUDGET, enable_prefix_caching=True) as made:
        return sum(
            differ(made.tokens(asked[0], budget), expected[budget])
            for budget in (0.2, 1.0, 0.2, 1.0)
        )


def test_if_blocks_that_are_written_again_were_hashed(folder, asked, expected, monkeypatch):
    manager = scheduling.CompactingManager
    monkeypatch.setattr(manager, "cache_blocks", scheduling.FullAttentionManager.cache_blocks)
    assert through_one_prefix_cache(folder, asked, expected)


def test_if_a_hit_went_on_into_what_is_written_again(folder, asked, expected, monkeypatch):
    manager = scheduling.CompactingManager
    whole = scheduling.FullAttentionManager.__dict__["find_longest_cache_hit"]
    monkeypatch.setattr(manager, "find_longest_cache_hit", whole)
    assert through_one_prefix_cache(folder, asked, expected)


def test_if_outputs_were_not_computed_again(folder, asked, expected, monkeypatch):
    monkeypatch.setattr(plan.Plan, "repeated", property(lambda self: []))
    with engine(folder, BUDGET, max_num_seqs=32) as made:
        made.preempt_all_at(8, 15)
        assert differ(made.tokens(asked[0]), expected[0.2])


def test_if_queries_of_earlier_chunks_were_not_saved(folder, asked, monkeypatch):
    monkeypatch.setattr(plan, "_saving", lambda row, window: None)
    with engine(folder, BUDGET, max_num_batched_tokens=512) as made:
        length = len(made.ask(asked[0][:1], tokens=1)[0].prompt_token_ids)
        made.scheduler.max_num_scheduled_tokens = length - 1
        with pytest.raises(Exception, match="no queries were saved"):
            made.tokens(asked[0][:1])
