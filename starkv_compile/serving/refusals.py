"""What compaction is not right with. An engine that asks for both does not start."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from ..errors import OptionError, UnsupportedModel
from .rule import BUDGET, CHUNK, Rule

PRECISIONS = ("auto", "float16", "bfloat16", "float32")
"""Values of `--kv-cache-dtype` that store keys and values as they are."""


def check_engine(config: Any, rule: Rule) -> None:
    """Raises `UnsupportedModel` for a `VllmConfig` that compaction is not right with."""
    parallel, cache, model = config.parallel_config, config.cache_config, config.model_config
    drafts = config.speculative_config
    reasons = {
        "speculative decoding with a draft model (ngram works)": drafts is not None
        and drafts.method != "ngram",
        "KV transfer between engines": config.kv_transfer_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "dual batch overlap": parallel.use_ubatching,
        f"{CHUNK} without chunked prefill": rule.chunk
        and not config.scheduler_config.enable_chunked_prefill,
        f"{CHUNK} with --disable-chunked-mm-input (a stop may lie inside of an image)": rule.chunk
        and config.scheduler_config.disable_chunked_mm_input,
        f"a KV cache in {cache.cache_dtype}": cache.cache_dtype not in PRECISIONS,
    }
    if model is not None:
        reasons |= {
            f"{CHUNK} for a model with layers of Mamba": rule.chunk and model.is_hybrid,
            "multi-head latent attention": model.use_mla,
            "images whose tokens see each other": model.is_mm_prefix_lm,
            "the pooling runner (embeddings, scores), which decodes nothing": model.runner_type
            == "pooling",
            "local attention without the hybrid KV cache manager": _has_local_layers(model)
            and bool(config.scheduler_config.disable_hybrid_kv_cache_manager),
        }
    _refuse([name for name, given in reasons.items() if given])


def _has_local_layers(model: Any) -> bool:
    """Whether some layers of a `ModelConfig` see the newest tokens only."""
    text = model.hf_text_config
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    slides = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    return bool(slides or getattr(text, "attention_chunk_size", None))


def check_request(
    budget: Fraction | None,
    rule: Rule | None,
    *,
    is_stream: bool = False,
    has_beams: bool = False,
    scores_prompt: bool = False,
) -> None:
    """Raises `OptionError` for a request that the engine cannot compact as asked.

    Args:
        budget: what the request asks for; None for the engine's budget.
        rule: the engine's rule; None if it was started without the option.
        is_stream: whether more of the prompt comes later.
        has_beams: whether the reply is searched with beams.
        scores_prompt: whether it asks for logprobs of the prompt's tokens.
    """
    if rule is None and budget is not None:
        raise OptionError(
            f"{BUDGET}: this engine was started without the option 'starkv', so it compacts "
            'nothing; start it with --additional-config \'{"starkv": {"budget": 1.0}}\' to let '
            "requests choose"
        )
    if rule is not None and is_stream:
        raise OptionError(
            "starkv does not support streaming sessions, whose prompts grow; send the whole "
            "prompt, or start the engine without the option 'starkv'"
        )
    # A budget of 1.0 is refused, too: beams lose it on the way to the engine.
    if rule is not None and has_beams and not (budget is None and rule.keeps_everything()):
        raise OptionError(
            "starkv does not support beam search, because vLLM reads the whole prompt again for "
            "each token of a beam; leave out use_beam_search, or start the engine with the budget "
            f"1.0 and leave out {BUDGET}"
        )
    if rule is not None and scores_prompt and rule.chunk and not rule.keeps_everything(budget):
        raise OptionError(
            f"starkv does not support prompt_logprobs with {CHUNK}, because tokens after a stop do "
            f"not see those that were dropped there; ask with {BUDGET}=1.0, or start the engine "
            f"without {CHUNK}"
        )


def check_fields(unknown: Iterable[str] | None) -> None:
    """Raises `OptionError` for a field of an HTTP request that vLLM would ignore."""
    for name in unknown or ():
        if name.startswith("starkv"):
            raise OptionError(
                f'{name}: vLLM ignores this field; send {{"vllm_xargs": {{"{BUDGET}": 0.5}}}}'
            )


def check_layer(attention: Any) -> None:
    """Raises `UnsupportedModel` for an attention whose logits depend on more than the keys."""
    reasons = {
        "ALiBi": getattr(attention, "alibi_slopes", None) is not None,
        "attention sinks": getattr(attention, "sinks", None) is not None,
        "soft caps of logits": bool(getattr(attention, "logits_soft_cap", None)),
        "layers that share a cache": getattr(attention, "kv_sharing_target_layer_name", None)
        is not None,
    }
    _refuse([name for name, given in reasons.items() if given])


def check_caches(groups: Any, rule: Rule | None) -> None:
    """Raises `UnsupportedModel` if no layer of the engine is compacted, or half of a group.

    Args:
        groups: vLLM's KV-cache groups.
        rule: the engine's rule.
    """
    specs = [group.kv_cache_spec for group in groups]
    if rule is not None and any(_is_mixed(spec) for spec in specs):
        raise UnsupportedModel(
            "starkv does not support one KV-cache group with layers that are compacted and layers "
            "that are not; start the engine without the option 'starkv'"
        )
    if rule is None or any(map(is_compacted, specs)):
        return
    from .backends import WRAPPED

    raise UnsupportedModel(
        "starkv compacts no layer of this model: none has full attention in one of the backends "
        f"{', '.join(WRAPPED)}; choose one with --attention-backend, or leave the option out"
    )


def is_compacted(spec: Any) -> bool:
    """Whether prompts are compacted in the layers, or some of the layers, of a KV-cache spec."""
    specs = getattr(spec, "kv_cache_specs", None)
    return any(getattr(one, "rule", "") for one in (specs.values() if specs else [spec]))


def _is_mixed(spec: Any) -> bool:
    specs = getattr(spec, "kv_cache_specs", None) or {}
    return len({bool(getattr(one, "rule", "")) for one in specs.values()}) > 1


def _refuse(names: list[str]) -> None:
    if names:
        raise UnsupportedModel(
            f"starkv does not support {' and '.join(names)} in vLLM; leave that out, or start the "
            "engine without the option 'starkv'"
        )
