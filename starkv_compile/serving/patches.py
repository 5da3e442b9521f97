"""What vLLM 0.32 has no extension point for: methods that are wrapped.

Each is wrapped by `versions.wrap`, which checks that it has the parameters of the tested version.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from ..errors import StarKVError
from .current import batch_of_v1, batch_of_v2, current_rule, entered, note_batch
from .metrics import Counters
from .refusals import check_caches, check_engine, check_request
from .rule import BUDGET, Rule, budget_of
from .versions import given_options, wrap

Method = Callable[..., Any]


def apply() -> None:
    """Wraps them all."""
    _check_configuration()
    _check_budgets()
    _check_requests()
    _tell_whose_prefix()
    _tell_whose_rows_v1()
    _keep_last_tokens_out_of_full_graphs()
    # The V2 runner imports Triton.
    if importlib.util.find_spec("triton") is not None:
        _tell_whose_rows_v2()


def _check_configuration() -> None:
    """An engine with impossible options stops before it starts workers."""
    from vllm.config import VllmConfig

    def make(original: Method) -> Method:
        def post_init(self: Any) -> None:
            original(self)
            given = given_options(self)
            if given is not None:
                Rule.of(given)
                check_engine(self)

        return post_init

    wrap(VllmConfig, "__post_init__", ("self",), make)


def _check_budgets() -> None:
    """An impossible budget is refused with the other sampling parameters: before vLLM has noted
    that it has seen the request's images."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    def make(original: Method) -> Method:
        def verify(self: Any) -> None:
            original(self)
            try:
                budget_of(self)
            except StarKVError as error:  # a server answers this one with status 400
                raise VLLMValidationError(str(error), parameter=BUDGET) from error

        return verify

    wrap(SamplingParams, "_verify_args", ("self",), make)


def _check_requests() -> None:
    """A request that the engine cannot compact is refused, and those that it does are counted."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    def make(original: Method) -> Method:
        def process_inputs(
            self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
        ) -> Any:
            given, budget = given_options(self.vllm_config), budget_of(params)
            try:
                check_request(budget, given, is_stream=kwargs.get("resumable", False))
            except StarKVError as error:
                raise VLLMValidationError(str(error), parameter=BUDGET) from error
            made = original(self, request_id, prompt, params, *args, **kwargs)
            if given is not None and made.sampling_params is not None:
                length = len(made.prompt_token_ids or ())
                block = self.vllm_config.cache_config.block_size
                skip = Rule.of(given).skip(length, block, budget)
                Counters.of_process().count(length, skip, block)
            return made

        return process_inputs

    parameters = ("self", "request_id", "prompt", "params")
    wrap(InputProcessor, "process_inputs", parameters, make)


def _tell_whose_prefix() -> None:
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

    wrap(KVCacheManager, "get_computed_blocks", ("self", "request"), make)


def _tell_whose_rows_v1() -> None:
    """Builders of metadata are told the requests of a step. Steps of a warm-up have none."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def make(original: Method) -> Method:
        def build(self: Any, *args: Any, **kwargs: Any) -> Any:
            is_real = kwargs.get("num_scheduled_tokens") is not None
            if is_real:
                check_caches(self.kv_cache_config.kv_cache_groups, current_rule())
            with entered(batch_of_v1(self) if is_real else None):
                return original(self, *args, **kwargs)

        return build

    parameters = ("self", "num_tokens", "num_reqs", "max_query_len")
    wrap(GPUModelRunner, "_build_attention_metadata", parameters, make)


def _keep_last_tokens_out_of_full_graphs() -> None:
    """A prompt's last chunk may look like decoding, but its attention must run outside of graphs.

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
            if current_rule() is not None and count <= self.input_batch.num_reqs:
                before = self.input_batch.num_computed_tokens_cpu[:count]
                prompts = self.input_batch.num_prompt_tokens[:count]
                ends = (before < prompts) & (before + num_scheduled_tokens_np >= prompts)
                if (ends & (num_scheduled_tokens_np <= self.uniform_decode_query_len)).any():
                    kwargs["force_eager"] = True
            return original(self, num_tokens, num_reqs, num_scheduled_tokens_np, *args, **kwargs)

        return determine

    parameters = ("self", "num_tokens", "num_reqs", "num_scheduled_tokens_np")
    wrap(GPUModelRunner, "_determine_batch_execution_and_padding", parameters, make)


def _tell_whose_rows_v2() -> None:
    """The same for the V2 runner, which has not run: no machine of ours has a GPU."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def make_add(original: Method) -> Method:
        def add_requests(self: Any, scheduler_output: Any) -> Any:
            budgets = self.__dict__.setdefault("starkv_budgets", {})
            for new in scheduler_output.scheduled_new_reqs:
                budgets[new.req_id] = budget_of(new.sampling_params)
            for request in scheduler_output.finished_req_ids:
                budgets.pop(request, None)
            return original(self, scheduler_output)

        return add_requests

    def make_gather(original: Method) -> Method:
        def gather(self: Any, scheduler_output: Any, dummy_run: bool) -> Any:
            state, uniform = original(self, scheduler_output, dummy_run)
            is_ending = state is not None and current_rule() is not None and state.has_prefill
            return state, None if is_ending else uniform

        return gather

    def make_prepare(original: Method) -> Method:
        def prepare_attn(self: Any, input_batch: Any) -> Any:
            check_caches(self.kv_cache_config.kv_cache_groups, current_rule())
            note_batch(batch_of_v2(self, input_batch))
            return original(self, input_batch)

        return prepare_attn

    def make_execute(original: Method) -> Method:
        def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            with entered(None):
                return original(self, *args, **kwargs)

        return execute_model

    wrap(GPUModelRunner, "add_requests", ("self", "scheduler_output"), make_add)
    parameters = ("self", "scheduler_output", "dummy_run")
    wrap(GPUModelRunner, "gather_batch_req_state", parameters, make_gather)
    wrap(GPUModelRunner, "prepare_attn", ("self", "input_batch"), make_prepare)
    wrap(GPUModelRunner, "execute_model", ("self", "scheduler_output"), make_execute)
