"""What vLLM 0.32 has no extension point for: methods that are wrapped.

`versions.Patch` checks that each has the parameters of the tested version.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import StarKVError
from .current import batch_of_v1, batch_of_v2, entered, note_batch, rule_of
from .metrics import count_prompt
from .refusals import check_caches, check_engine, check_fields, check_request
from .rule import budget_in, budget_of
from .versions import Method, Patch, given_options


def all_patches() -> list[Patch]:
    """Every method that is wrapped."""
    patches = [
        _check_configuration(),
        _check_budgets(),
        _check_requests(),
        *_check_before_images_are_read(),
        _check_beams(),
        _tell_whose_prefix(),
        _share_nothing_after_a_stop(),
        *_end_chunks_at_stops(),
        *_tell_whose_rows_v1(),
        _keep_prompts_out_of_full_graphs(),
    ]
    if importlib.util.find_spec("triton") is not None:  # the V2 runner imports it
        patches += _tell_whose_rows_v2()
    return patches


def _check_configuration() -> Patch:
    """An engine with impossible options stops before it starts workers."""
    from vllm.config import VllmConfig

    def make(original: Method) -> Method:
        def post_init(self: Any) -> None:
            original(self)
            rule = rule_of(self)
            if rule is not None:
                check_engine(self, rule)

        return post_init

    return Patch(VllmConfig, "__post_init__", ("self",), make)


@contextmanager
def _refused_by_vllm() -> Iterator[None]:
    """Inside, a fault of a request is raised as vLLM's own: a server answers it with status 400."""
    from vllm.exceptions import VLLMValidationError

    try:
        yield
    except StarKVError as error:
        raise VLLMValidationError(str(error)) from error


def _check_budgets() -> Patch:
    """An impossible budget is refused with the other sampling parameters, when they are made."""
    from vllm.sampling_params import SamplingParams

    def make(original: Method) -> Method:
        def verify(self: Any) -> None:
            original(self)
            with _refused_by_vllm():
                budget_of(self)

        return verify

    return Patch(SamplingParams, "_verify_args", ("self",), make)


def _check_requests() -> Patch:
    """A request that the engine cannot compact is refused, and those that it does are counted."""
    from vllm.utils import length_from_prompt_token_ids_or_embeds
    from vllm.v1.engine.input_processor import InputProcessor

    def make(original: Method) -> Method:
        def process_inputs(
            self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
        ) -> Any:
            rule = rule_of(self.vllm_config)
            with _refused_by_vllm():
                budget = budget_of(params)
                check_request(
                    budget,
                    rule,
                    is_stream=kwargs.get("resumable", False),
                    scores_prompt=_scores_prompt(params),
                )
            made = original(self, request_id, prompt, params, *args, **kwargs)
            if rule is not None and made.sampling_params is not None:
                length = length_from_prompt_token_ids_or_embeds(
                    made.prompt_token_ids, made.prompt_embeds
                )
                block = self.vllm_config.cache_config.block_size
                skip = rule.skip(length, block, budget)
                count_prompt(length, skip, block, made.sampling_params.n)
            return made

        return process_inputs

    parameters = ("self", "request_id", "prompt", "params")
    return Patch(InputProcessor, "process_inputs", parameters, make)


def _scores_prompt(asked: Any) -> bool:
    """Whether sampling parameters, or a request over HTTP, ask for logprobs of the prompt."""
    names = ("prompt_logprobs", "prompt_logprob_token_ids")
    return any(getattr(asked, name, None) is not None for name in names)


def _check_before_images_are_read() -> list[Patch]:
    """A server and `LLM` refuse a request before they read its images.

    vLLM notes images as sent when it has read them. If it refuses a request after that, it fails on
    the next one with the same images.
    """
    from vllm.entrypoints.common.offline import OfflineInferenceMixin
    from vllm.entrypoints.serve.engine.serving import BaseServing

    def make_check_model(original: Method) -> Method:
        async def check_model(self: Any, request: Any) -> Any:
            engine = getattr(self, "engine_client", None)  # none in a server that only renders
            if engine is not None:
                with _refused_by_vllm():
                    check_fields(getattr(request, "model_extra", None))
                    check_request(
                        budget_in(getattr(request, "vllm_xargs", None)),
                        rule_of(engine.vllm_config),
                        has_beams=getattr(request, "use_beam_search", False),
                        scores_prompt=_scores_prompt(request),
                    )
            return await original(self, request)

        return check_model

    def make_params_to_seq(original: Method) -> Method:
        def params_to_seq(self: Any, params: Any, num_requests: int) -> Any:
            found, rule = original(self, params, num_requests), rule_of(self.llm_engine.vllm_config)
            with _refused_by_vllm():
                for one in found:
                    check_request(budget_of(one), rule, scores_prompt=_scores_prompt(one))
            return found

        return params_to_seq

    params = ("self", "params", "num_requests")
    return [
        Patch(BaseServing, "_check_model", ("self", "request"), make_check_model),
        Patch(OfflineInferenceMixin, "_params_to_seq", params, make_params_to_seq),
    ]


def _check_beams() -> Patch:
    """`LLM.beam_search` is refused where prompts lose tokens. It takes no budget of its own."""
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin

    def make(original: Method) -> Method:
        def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _refused_by_vllm():
                check_request(None, rule_of(self.llm_engine.vllm_config), has_beams=True)
            return original(self, *args, **kwargs)

        return beam_search

    return Patch(BeamSearchOfflineMixin, "beam_search", ("self", "prompts", "params"), make)


def _tell_whose_prefix() -> Patch:
    """The lookup of a cached prefix is told its request."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    from .scheduling import CompactingManager, looked_up

    def make(original: Method) -> Method:
        def get_computed_blocks(self: Any, request: Any) -> Any:
            for manager in self.coordinator.single_type_managers:
                if isinstance(manager, CompactingManager):
                    manager.note(request)
            with looked_up(request):
                return original(self, request)

        return get_computed_blocks

    return Patch(KVCacheManager, "get_computed_blocks", ("self", "request"), make)


def _share_nothing_after_a_stop() -> Patch:
    """What is computed after tokens have left is the request's own in layers of other groups, too:
    a sliding window's keys come from what compacted layers returned."""
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator

    from .scheduling import CompactingManager

    def make(original: Method) -> Method:
        def cache_blocks(self: Any, request: Any, num_computed_tokens: int) -> None:
            stops = [
                manager.first_drop(request)
                for manager in self.single_type_managers
                if isinstance(manager, CompactingManager)
            ]
            found = [stop for stop in stops if stop is not None]
            original(self, request, min([num_computed_tokens, *found]))

        return cache_blocks

    parameters = ("self", "request", "num_computed_tokens")
    return Patch(KVCacheCoordinator, "cache_blocks", parameters, make)


def _end_chunks_at_stops() -> list[Patch]:
    """A chunk of a prompt ends where the prompt is compacted, as chunks end where the state of a
    Mamba layer is stored. Models with such layers are refused."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from .scheduling import CompactingManager

    def make_init(original: Method) -> Method:
        def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, vllm_config, *args, **kwargs)
            self.starkv_rule = rule_of(vllm_config)
            if self.starkv_rule is None or self.starkv_rule.chunk is None:
                return
            self.need_mamba_block_aligned_split = True
            # With asynchronous scheduling, a chunk is planned before the last one has come back.
            delay = int(bool(self.scheduler_config.async_scheduling))
            for manager in self.kv_cache_manager.coordinator.single_type_managers:
                if isinstance(manager, CompactingManager):
                    manager.delay = delay

        return init

    def make_split(original: Method) -> Method:
        def split(
            self: Any, request: Any, num_new_tokens: int, *computed: int, **kwargs: Any
        ) -> int:
            rule = self.starkv_rule
            if rule is None or rule.chunk is None:
                return int(original(self, request, num_new_tokens, *computed, **kwargs))
            start = request.num_computed_tokens + sum(computed) + sum(kwargs.values())
            length = request.num_prompt_tokens
            if start >= length:
                return num_new_tokens
            stop = rule.next_stop(start, length)
            # Outputs of a preempted request may come in the same step as the end of its prompt.
            return num_new_tokens if stop == length else min(num_new_tokens, stop - start)

        return split

    created = ("self", "vllm_config", "kv_cache_config")
    split = ("self", "request", "num_new_tokens", "num_new_local_computed_tokens")
    return [
        Patch(Scheduler, "__init__", created, make_init),
        Patch(Scheduler, "_mamba_block_aligned_split", split, make_split),
    ]


def _tell_whose_rows_v1() -> list[Patch]:
    """Builders of metadata are told the requests of a step. Steps of a warm-up have none."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def make(original: Method) -> Method:
        def build(self: Any, *args: Any, **kwargs: Any) -> Any:
            is_real = kwargs.get("num_scheduled_tokens") is not None
            with entered(batch_of_v1(self) if is_real else None):
                return original(self, *args, **kwargs)

        return build

    parameters = ("self", "num_tokens", "num_reqs", "max_query_len")
    return [
        _check_caches(GPUModelRunner),
        Patch(GPUModelRunner, "_build_attention_metadata", parameters, make),
    ]


def _keep_prompts_out_of_full_graphs() -> Patch:
    """A chunk of a prompt may look like decoding, but its attention must run outside of graphs.

    It does if it has as many tokens as a step of decoding: 1, and drafts.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def make(original: Method) -> Method:
        def determine(
            self: Any,
            num_tokens: int,
            num_reqs: int,
            num_scheduled_tokens_np: Any,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            count = len(num_scheduled_tokens_np)
            is_on = given_options(self.vllm_config) is not None
            if is_on and count <= self.input_batch.num_reqs:
                before = self.input_batch.num_computed_tokens_cpu[:count]
                reads = before < self.input_batch.num_prompt_tokens[:count]
                if (reads & (num_scheduled_tokens_np <= self.uniform_decode_query_len)).any():
                    kwargs["force_eager"] = True
            return original(self, num_tokens, num_reqs, num_scheduled_tokens_np, *args, **kwargs)

        return determine

    parameters = ("self", "num_tokens", "num_reqs", "num_scheduled_tokens_np")
    return Patch(GPUModelRunner, "_determine_batch_execution_and_padding", parameters, make)


def _tell_whose_rows_v2() -> list[Patch]:
    """The same for the V2 runner, which has not run: no machine of ours has a GPU."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def make_add(original: Method) -> Method:
        def add_requests(self: Any, scheduler_output: Any) -> Any:
            budgets = self.__dict__.setdefault("starkv_budgets", {})
            for request in scheduler_output.finished_req_ids:
                budgets.pop(request, None)
            for new in scheduler_output.scheduled_new_reqs:  # an id may be used again at once
                budgets[new.req_id] = budget_of(new.sampling_params)
            return original(self, scheduler_output)

        return add_requests

    def make_gather(original: Method) -> Method:
        def gather(self: Any, scheduler_output: Any, dummy_run: bool) -> Any:
            state, uniform = original(self, scheduler_output, dummy_run)
            reads = state is not None and state.has_prefill
            is_on = given_options(self.vllm_config) is not None
            return state, None if is_on and reads else uniform

        return gather

    def make_prepare(original: Method) -> Method:
        def prepare_attn(self: Any, input_batch: Any) -> Any:
            note_batch(batch_of_v2(self, input_batch))
            return original(self, input_batch)

        return prepare_attn

    def make_execute(original: Method) -> Method:
        def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            with entered(None):
                return original(self, *args, **kwargs)

        return execute_model

    gathered = ("self", "scheduler_output", "dummy_run")
    return [
        _check_caches(GPUModelRunner),
        Patch(GPUModelRunner, "add_requests", ("self", "scheduler_output"), make_add),
        Patch(GPUModelRunner, "gather_batch_req_state", gathered, make_gather),
        Patch(GPUModelRunner, "prepare_attn", ("self", "input_batch"), make_prepare),
        Patch(GPUModelRunner, "execute_model", ("self", "scheduler_output"), make_execute),
    ]


def _check_caches(runner: type) -> Patch:
    """An engine none of whose layers is compacted stops at its start."""

    def make(original: Method) -> Method:
        def initialize_kv_cache(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
            found = original(self, kv_cache_config, *args, **kwargs)
            check_caches(kv_cache_config.kv_cache_groups, rule_of(self.vllm_config))
            return found

        return initialize_kv_cache

    return Patch(runner, "initialize_kv_cache", ("self", "kv_cache_config"), make)
