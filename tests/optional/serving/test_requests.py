"""What requests may ask for, and what is refused."""

import pytest

pytest.importorskip("vllm", reason="make test-serving installs vLLM")

from vllm.exceptions import VLLMValidationError

from benchmarks.engines import BLOCK, engine
from starkv_compile import OptionError, UnsupportedModel
from starkv_compile.serving.metrics import NAMES, Counters

BUDGET = {"budget": 0.2}


@pytest.fixture(scope="module")
def made(folder):
    with engine(folder, BUDGET) as one:
        yield one


def test_samples_logprobs_and_stop_strings(made, asked, expected):
    found = made.ask(asked[0][:3], n=2, temperature=0.7, seed=7)
    assert all(len(one.outputs) == 2 for one in found)
    found = made.ask(asked[0][:3], logprobs=3)
    assert [list(one.outputs[0].token_ids) for one in found] == expected[0.2][:3]
    assert all(len(step) >= 3 for one in found for step in one.outputs[0].logprobs)
    whole = made.ask(asked[0][:1])[0].outputs[0].text
    word = whole.split()[2]
    stopped = made.ask(asked[0][:1], stop=[word])[0].outputs[0]
    assert stopped.finish_reason == "stop"
    assert word not in stopped.text


def test_an_aborted_request_gives_its_blocks_back(made, asked, expected):
    from vllm import SamplingParams

    held = made.llm.llm_engine
    for i in range(4):
        held.add_request(f"gone-{i}", asked[0][i], SamplingParams(max_tokens=50, ignore_eos=True))
    for _ in range(6):
        held.step()
    assert made.blocks_in_use
    held.abort_request([f"gone-{i}" for i in range(4)])
    held.step()
    assert made.blocks_in_use == 0
    assert made.tokens(asked[0][:2]) == expected[0.2][:2]


@pytest.mark.parametrize("budget", [0, 1.5, "20", "much", -0.1])
def test_an_impossible_budget_is_refused_and_harms_nobody(made, asked, expected, budget):
    with pytest.raises(VLLMValidationError, match="starkv_budget"):
        made.ask(asked[0][:1], budget)
    assert made.tokens(asked[0][:1], "20%") == expected[0.2][:1]


def test_tokens_are_counted(made, asked):
    counters = Counters.of_process().by_name

    def values():
        return [counters[name]._value.get() for name in NAMES]

    before = values()
    lengths = [len(one.prompt_token_ids) for one in made.ask(asked[0], 0.5, tokens=1)]
    prompts, seen, kept, freed = (b - a for a, b in zip(before, values(), strict=True))
    assert (prompts, seen) == (len(lengths), sum(lengths))
    assert freed * BLOCK == seen - kept
    assert seen / 2 <= kept < seen / 2 + BLOCK * prompts


REFUSED = {
    "unknown": ({"buget": 0.2}, {}, "buget"),
    "no share": ({"budget": 1.5}, {}, "budget=1.5"),
    "bytes": ({"budget_bytes": 10**9}, {}, "budget_bytes=1000000000 has no meaning in vLLM"),
    "few bits": ({"nbits": 4}, {}, "nbits=4 has no meaning in vLLM"),
    "hidden states": ({"policy": "starkv"}, {}, "policy='starkv' does not work in vLLM"),
    "uneven layers": ({"policy": "pyramidkv"}, {}, "policy='pyramidkv' does not work in vLLM"),
    "no options": (0.2, {}, "expected options such as"),
    "a cache in fp8": (BUDGET, {"kv_cache_dtype": "fp8"}, "a KV cache in fp8"),
}


@pytest.mark.parametrize(("starkv", "options", "why"), REFUSED.values(), ids=REFUSED)
def test_an_engine_that_would_be_wrong_does_not_start(folder, starkv, options, why):
    with pytest.raises(Exception, match=why) as caught, engine(folder, starkv, **options):
        pass
    chain = [caught.value, caught.value.__cause__, caught.value.__context__]
    assert any(isinstance(e, (OptionError, UnsupportedModel, ValueError)) for e in chain)
