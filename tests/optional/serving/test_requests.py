"""What requests may ask for, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm", reason="make test-serving installs vLLM")

from vllm.exceptions import VLLMValidationError

from benchmarks.engines import BLOCK, CHECKPOINT, engine
from starkv_compile import OptionError, UnsupportedModel
from starkv_compile.serving.metrics import of_layers, of_requests

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


def test_a_budget_that_is_set_late_is_refused_as_well(made):
    """AsyncLLM says nothing of errors that are not vLLM's own."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1)
    params.extra_args = {"starkv_budget": 7}
    processor = made.llm.llm_engine.input_processor
    with pytest.raises(VLLMValidationError, match="starkv_budget"):
        processor.process_inputs("one", "where is Save ?", params, ("generate",))


def test_beams_are_refused(made, asked):
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=2, max_tokens=3)
    with pytest.raises(VLLMValidationError, match="does not support beam search"):
        made.llm.beam_search(asked[0][:1], params)


def values(counters=of_requests):
    return [counter._value.get() for counter in counters().values()]


def test_prompts_that_are_embeddings_are_counted(made):
    from vllm import SamplingParams

    before = values()
    prompt = {"type": "embeds", "prompt_embeds": torch.zeros(320, 64)}
    params = SamplingParams(max_tokens=1)
    made.llm.llm_engine.input_processor.process_inputs("one", prompt, params, ("generate",))
    assert [b - a for a, b in zip(before, values(), strict=True)] == [1, 320, 64, 256 // BLOCK]


def test_tokens_are_counted(made, asked):
    compactions, seconds = values(of_layers)

    before = values()
    lengths = [len(one.prompt_token_ids) for one in made.ask(asked[0], 0.5, tokens=1)]
    prompts, seen, kept, freed = (b - a for a, b in zip(before, values(), strict=True))
    assert (prompts, seen) == (len(lengths), sum(lengths))
    assert freed * BLOCK == seen - kept
    assert seen / 2 <= kept < seen / 2 + BLOCK * prompts
    now = values(of_layers)
    assert now[0] - compactions == 4 * prompts, "in each of four layers"
    assert now[1] > seconds


def write_adapter(folder):
    """A LoRA adapter of the demo agent that changes its replies."""
    config = json.loads((Path(CHECKPOINT) / "config.json").read_text())["text_config"]
    generator, weights = torch.Generator().manual_seed(0), {}
    heads = {"q": "num_attention_heads", "k": "num_key_value_heads", "v": "num_key_value_heads"}
    for layer in range(config["num_hidden_layers"]):
        for name, count in heads.items():
            where = f"base_model.model.model.language_model.layers.{layer}.self_attn.{name}_proj"
            sizes = {"A": (8, config["hidden_size"]), "B": (config[count] * config["head_dim"], 8)}
            for side, size in sizes.items():
                weight = torch.randn(size, generator=generator) * 0.1
                weights[f"{where}.lora_{side}.weight"] = weight
    save_file(weights, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none"}
    told |= {"target_modules": [f"{name}_proj" for name in heads], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(told))


def test_an_adapter(folder, asked, expected, tmp_path):
    """Keys of an adapter are scored, and prefixes of one adapter are shared among its requests."""
    from vllm.lora.request import LoRARequest

    write_adapter(tmp_path)
    adapter = LoRARequest("adapter", 1, str(tmp_path))
    options = {"enable_lora": True, "max_lora_rank": 8}
    with engine(folder, **options) as plain:
        whole = plain.tokens(asked[0], adapter=adapter)
    assert whole != expected[1.0]
    with engine(folder, BUDGET, **options) as fresh:
        assert fresh.tokens(asked[0], 1.0, adapter=adapter) == whole
        kept = fresh.tokens(asked[0], adapter=adapter)
    assert kept not in (whole, expected[0.2])
    options |= {"enable_prefix_caching": True, "long_prefill_token_threshold": 64}
    with engine(folder, BUDGET, **options) as made:
        for budget, told in ((None, kept), (1.0, whole), (None, kept)):
            assert made.tokens(asked[0], budget, adapter=adapter) == told
        assert made.tokens(asked[0]) == expected[0.2], "without the adapter"


REFUSED = {
    "unknown": ({"buget": 0.2}, {}, "buget"),
    "no share": ({"budget": 1.5}, {}, "budget=1.5"),
    "bytes": ({"budget_bytes": 10**9}, {}, "budget_bytes=1000000000 has no meaning in vLLM"),
    "few bits": ({"nbits": 4}, {}, "nbits=4 has no meaning in vLLM"),
    "hidden states": ({"policy": "starkv"}, {}, "policy='starkv' does not work in vLLM"),
    "uneven layers": ({"policy": "pyramidkv"}, {}, "policy='pyramidkv' does not work in vLLM"),
    "no options": (0.2, {}, "expected options such as"),
    "pooling": (BUDGET, {"runner": "pooling", "convert": "embed"}, "the pooling runner"),
    "a cache in fp8": (BUDGET, {"kv_cache_dtype": "fp8"}, "a KV cache in fp8"),
}


@pytest.mark.parametrize(("starkv", "options", "why"), REFUSED.values(), ids=REFUSED)
def test_an_engine_that_would_be_wrong_does_not_start(folder, starkv, options, why):
    with pytest.raises(Exception, match=why) as caught, engine(folder, starkv, **options):
        pass
    chain = [caught.value, caught.value.__cause__, caught.value.__context__]
    assert any(isinstance(e, (OptionError, UnsupportedModel, ValueError)) for e in chain)
