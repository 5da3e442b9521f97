"""Whatever the scheduler does, replies are those of an engine with room for all."""

import random

import pytest

pytest.importorskip("vllm", reason="make test-serving installs vLLM")

from vllm.exceptions import VLLMValidationError

from benchmarks.engines import BLOCK, engine, prompts

BUDGET = {"budget": 0.2}
LONGER = " it is red star . <|end|> <|user|> where step 1 red star <|agent|>"


def test_without_the_option_all_is_as_without_the_plugin(folder, asked, expected, monkeypatch):
    with engine(folder) as plain:
        kinds = {type(m).__name__ for m in _managers(plain)}
        assert kinds == {"FullAttentionManager"}
        assert plain.tokens(asked[0]) == expected[1.0]
        # vLLM fails on the next request with images that it has read for a refused one.
        monkeypatch.setattr(plain.llm, "_preprocess_cmpl_one", lambda *_, **__: pytest.fail("read"))
        with pytest.raises(VLLMValidationError, match="without the option 'starkv'"):
            plain.ask(asked[0][:1], 0.5)


def _managers(made):
    return made.scheduler.kv_cache_manager.coordinator.single_type_managers


def test_blocks_are_freed_and_given_back(folder, asked):
    with engine(folder, BUDGET) as made:
        for budget in (1.0, 0.2):
            made.used.clear()
            made.tokens(asked[0], budget, tokens=8)
            decoding = made.used[-2] / len(asked[0])
            lengths = [len(one.prompt_token_ids) for one in made.ask(asked[0], budget, tokens=1)]
            kept = sum(budget * length for length in lengths) / len(lengths)
            assert decoding <= kept / BLOCK + 3, budget
            assert made.blocks_in_use == 0


@pytest.mark.parametrize("chunk", [64, 37])
def test_prompts_in_chunks(folder, asked, expected, chunk):
    with engine(folder, BUDGET, max_num_batched_tokens=chunk, max_num_seqs=8) as made:
        assert made.tokens(asked[0]) == expected[0.2]


def test_a_last_chunk_of_any_length(folder, asked, expected):
    """The window is 8 tokens: queries of earlier chunks are saved for last chunks of 1 to 7."""
    with engine(folder, BUDGET, max_num_batched_tokens=512) as made:
        for number, last in enumerate(range(1, 10)):
            prompt = asked[0][number % 4]
            length = len(made.ask([prompt], tokens=1)[0].prompt_token_ids)
            made.scheduler.max_num_scheduled_tokens = length - last
            assert made.tokens([prompt]) == [expected[0.2][number % 4]], last
            made.scheduler.max_num_scheduled_tokens = 512


def test_budgets_smaller_than_the_window_and_prefix_hits(folder, asked):
    """A hit may end three tokens before the prompt does."""
    tiny = {"budget_tokens": 3}
    with engine(folder, tiny) as fresh:
        whole = fresh.tokens(asked[0])
    with engine(folder, tiny, enable_prefix_caching=True) as made:
        for _ in range(2):
            assert made.tokens(asked[0]) == whole


def test_prefix_caching(folder, asked, expected):
    made_of, options = asked[0], {"enable_prefix_caching": True}
    with engine(folder, BUDGET, **options) as made:
        for round_number in range(3):
            found = made.ask(made_of)
            assert [list(one.outputs[0].token_ids) for one in found] == expected[0.2]
            if round_number:
                for one in found:
                    kept = len(one.prompt_token_ids) // 5
                    assert one.num_cached_tokens % BLOCK == 0
                    assert one.num_cached_tokens >= len(one.prompt_token_ids) - kept - 2 * BLOCK
        for budget in (1.0, 0.2, 1.0, 0.5):  # through one prefix cache
            assert made.tokens(made_of, budget) == expected[budget], budget
    longer = prompts(4, LONGER)[0]
    mixed = [prompt for pair in zip(longer, made_of[:4], strict=True) for prompt in pair]
    with engine(folder, BUDGET) as plain:
        whole = plain.tokens(longer)
    with engine(folder, BUDGET, **options) as made:
        first, second = made.tokens(mixed), made.tokens(mixed[::-1])[::-1]
    assert first == second
    assert first[0::2] == whole
    assert first[1::2] == expected[0.2][:4]


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_preempted_requests_go_on_as_if_they_had_not_been(folder, asked, expected, prefix_caching):
    options = {"num_gpu_blocks_override": 50, "enable_prefix_caching": prefix_caching}
    with engine(folder, BUDGET, max_num_seqs=32, **options) as made:
        assert made.tokens(asked[0], tokens=40)[0][:24] == expected[0.2][0]
        assert made.tokens(asked[0]) == expected[0.2]
        assert made.tokens(asked[0], 1.0) == expected[1.0]


def test_all_are_preempted_while_they_decode(folder, asked, expected):
    with engine(folder, BUDGET, max_num_seqs=32) as made:
        made.preempt_all_at(8, 15)
        assert made.tokens(asked[0]) == expected[0.2]
        assert made.preempted == 2 * len(asked[0])


def test_many_requests_at_once(folder, asked, expected):
    with engine(folder, BUDGET, max_num_seqs=64) as made:
        several = [asked[0][i % 12] for i in range(32)]
        assert made.tokens(several) == [expected[0.2][i % 12] for i in range(32)]
        assert max(made.running) == 32


@pytest.mark.parametrize("policy", ["screen_novelty", "snapkv"])
@pytest.mark.parametrize(
    ("stops", "blocks", "chunk"),
    [({}, 70, 128), ({"prefill_chunk_size": 96}, 50, 80)],
    ids=["at the end", "with stops"],
)
def test_all_of_it_at_once(folder, asked, policy, stops, blocks, chunk):
    starkv = {**BUDGET, **stops, "policy": policy}
    budgets = [[1.0, 0.5, 0.2][i % 3] for i in range(24)]
    several = [asked[0][i % 12] for i in range(24)]
    with engine(folder, starkv) as fresh:
        whole = fresh.tokens(several, budgets)
    order = list(range(24))
    options = {
        "enable_prefix_caching": True,
        "num_gpu_blocks_override": blocks,
        # Chunks, and room for the features of all screenshots: vLLM 0.32 fails if it has to compute
        # features again of a preempted request that began with a prefix hit.
        "max_num_batched_tokens": 4096,
        "long_prefill_token_threshold": chunk,
        "max_num_seqs": 16,
    }
    with engine(folder, starkv, **options) as made:
        for seed in (0, 1):
            random.Random(seed).shuffle(order)
            found = made.tokens([several[i] for i in order], [budgets[i] for i in order])
            assert found == [whole[i] for i in order]
        assert made.preempted, "the pool is small enough"
        assert made.blocks_in_use == 0


def test_metadata_at_fixed_addresses(folder, asked, expected, monkeypatch):
    """What a full CUDA graph would read, forced on where there is none."""
    with engine(folder, BUDGET) as made:
        builders = {
            group.get_metadata_builder(0) for groups in made.runner.attn_groups for group in groups
        }
        for builder in builders:
            builder.has_full_graphs = True
        assert made.tokens(asked[0]) == expected[0.2]
        assert all(builder.fixed is not None for builder in builders)
