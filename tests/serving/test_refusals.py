"""Engines and layers that compaction is not right with, by name."""

from types import SimpleNamespace as Some

import pytest

from starkv_compile import OptionError, UnsupportedModel
from starkv_compile.serving.refusals import (
    check_caches,
    check_engine,
    check_fields,
    check_layer,
    check_request,
)
from starkv_compile.serving.rule import Rule

RULE = Rule.of({})


def engine(**changed):
    """A configuration of vLLM, as far as it is read. changed: "part.field" and its value."""
    text = Some(layer_types=None, sliding_window=None, use_sliding_window=False)
    config = Some(
        parallel_config=Some(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
        ),
        cache_config=Some(cache_dtype="auto"),
        model_config=Some(
            use_mla=False,
            is_mm_prefix_lm=False,
            is_hybrid=False,
            runner_type="generate",
            hf_text_config=text,
        ),
        scheduler_config=Some(
            disable_hybrid_kv_cache_manager=False,
            enable_chunked_prefill=True,
            disable_chunked_mm_input=False,
        ),
        speculative_config=None,
        kv_transfer_config=None,
    )
    for path, value in changed.items():
        *parts, last = path.split(".")
        held = config
        for part in parts:
            held = getattr(held, part)
        setattr(held, last, value)
    return config


def test_what_is_right_starts():
    check_engine(engine(), RULE)
    check_engine(engine(speculative_config=Some(method="ngram")), RULE)
    check_engine(engine(**{"scheduler_config.disable_hybrid_kv_cache_manager": True}), RULE)


REFUSED = {
    "draft model": {"speculative_config": Some(method="eagle")},
    "KV transfer": {"kv_transfer_config": object()},
    "pipeline parallelism": {"parallel_config.pipeline_parallel_size": 2},
    "context parallelism": {"parallel_config.decode_context_parallel_size": 2},
    "dual batch overlap": {"parallel_config.use_ubatching": True},
    "a KV cache in int4_per_token_head": {"cache_config.cache_dtype": "int4_per_token_head"},
    "latent attention": {"model_config.use_mla": True},
    "the pooling runner": {"model_config.runner_type": "pooling"},
    "see each other": {"model_config.is_mm_prefix_lm": True},
    "local attention without": {
        "scheduler_config.disable_hybrid_kv_cache_manager": True,
        "model_config.hf_text_config.layer_types": ["full_attention", "sliding_attention"],
    },
}


@pytest.mark.parametrize(("why", "changed"), REFUSED.items(), ids=REFUSED)
def test_what_is_not_right_is_named(why, changed):
    with pytest.raises(UnsupportedModel, match=why):
        check_engine(engine(**changed), RULE)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("alibi_slopes", "ALiBi"),
        ("sinks", "attention sinks"),
        ("logits_soft_cap", "soft caps"),
        ("kv_sharing_target_layer_name", "layers that share a cache"),
    ],
)
def test_a_layer_whose_logits_depend_on_more_than_keys(name, why):
    check_layer(Some(**{name: None}))
    with pytest.raises(UnsupportedModel, match=why):
        check_layer(Some(**{name: 30.0}))


def test_an_engine_without_a_compacted_layer():
    rule = Rule.of({"budget": 0.2})
    plain, ours = Some(kv_cache_spec=Some()), Some(kv_cache_spec=Some(rule=rule.dumps()))
    alike = {"a": Some(rule=rule.dumps()), "b": Some(rule=rule.dumps())}
    several = Some(kv_cache_spec=Some(kv_cache_specs=alike))
    mixed = Some(kv_cache_spec=Some(kv_cache_specs={**alike, "c": Some()}))
    check_caches([plain], None)
    check_caches([plain, ours], rule)
    check_caches([several], rule)
    with pytest.raises(UnsupportedModel, match="compacts no layer of this model"):
        check_caches([plain], rule)
    with pytest.raises(UnsupportedModel, match="one KV-cache group"):
        check_caches([mixed], rule)


def test_requests():
    check_request(None, None, is_stream=True)
    check_request(1, Rule.of({"budget": 0.2}), is_stream=False)
    with pytest.raises(OptionError, match="without the option 'starkv'"):
        check_request(1, None, is_stream=False)
    with pytest.raises(OptionError, match="streaming sessions"):
        check_request(None, Rule.of({}), is_stream=True)


def test_a_budget_beside_vllm_xargs():
    check_fields(None)
    check_fields({"guided_json": "{}"})
    with pytest.raises(OptionError, match=r"starkv_budget: vLLM ignores this field; .*vllm_xargs"):
        check_fields({"guided_json": "{}", "starkv_budget": 0.5})


def test_beams_lose_a_budget_on_their_way_to_the_engine():
    half, everything = Rule.of({"budget": 0.5}), Rule.of({"budget": 1.0})
    check_request(None, None, has_beams=True)
    check_request(None, everything, has_beams=True)
    for budget, rule in ((None, half), (1, half), (1, everything), (0.5, everything)):
        with pytest.raises(OptionError, match="does not support beam search"):
            check_request(budget, rule, has_beams=True)


def test_logprobs_of_a_prompt_with_stops_inside():
    chunks = Rule.of({"budget": 0.5, "prefill_chunk_size": 64})
    check_request(None, Rule.of({"budget": 0.5}), scores_prompt=True)
    check_request(1, chunks, scores_prompt=True)
    check_request(None, Rule.of({"budget": 1.0, "prefill_chunk_size": 64}), scores_prompt=True)
    with pytest.raises(OptionError, match=r"prompt_logprobs with prefill_chunk_size.*=1\.0"):
        check_request(None, chunks, scores_prompt=True)


def test_stops_inside_of_prompts_need_chunks():
    rule = Rule.of({"prefill_chunk_size": 64})
    check_engine(engine(), rule)
    for path, value in (
        ("scheduler_config.enable_chunked_prefill", False),
        ("scheduler_config.disable_chunked_mm_input", True),
        ("model_config.is_hybrid", True),
    ):
        check_engine(engine(**{path: value}), RULE)
        with pytest.raises(UnsupportedModel, match="does not support prefill_chunk_size"):
            check_engine(engine(**{path: value}), rule)
