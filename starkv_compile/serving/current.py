"""What a worker process knows: its rule, and the requests of the step that it prepares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .rule import Rule, budget_of
from .versions import given_options

_rule: list[Rule | None] = [None]
_batch: list[Batch | None] = []


def rule_of(config: Any) -> Rule | None:
    """The rule of an engine with this `VllmConfig`; None without options."""
    given = given_options(config)
    return None if given is None else Rule.of(given)


def current_rule() -> Rule | None:
    """The rule of the engine that is being made; None without options.

    vLLM has a current configuration only while it makes a model, so the last one is remembered.
    """
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is not None:
        _rule[0] = rule_of(config)
    return _rule[0]


@dataclass(frozen=True)
class Batch:
    """The requests of a step, in the order of its rows.

    Attributes:
        requests: their ids.
        prompts: length of each prompt, an array.
        computed: how many tokens of each were computed before, an array.
        budget: a row's own budget.
        features: a row's images and videos.
        is_alive: whether a request is still in the engine.
        groups: the KV-cache groups of the engine.
        has_grids: whether vLLM keeps the grids of images that a prefix hit covers. It does for
            models with M-RoPE.
    """

    requests: list[str]
    prompts: Any
    computed: Any
    budget: Callable[[int], Fraction | None]
    features: Callable[[int], Any]
    is_alive: Callable[[str], bool]
    groups: Any
    has_grids: bool

    def block_size(self, layer: str) -> int:
        """Tokens in a block of the scheduler. A kernel's block may be smaller."""
        for group in self.groups:
            if layer in group.layer_names:
                return int(group.kv_cache_spec.block_size)
        raise KeyError(layer)


def batch_of_v1(runner: Any) -> Batch:
    """The batch that `vllm.v1.worker.gpu_model_runner.GPUModelRunner` is about to run."""
    held, known = runner.input_batch, runner.requests
    return Batch(
        requests=held.req_ids,
        prompts=held.num_prompt_tokens,
        computed=held.num_computed_tokens_cpu,
        budget=lambda row: budget_of(known[held.req_ids[row]].sampling_params),
        features=lambda row: known[held.req_ids[row]].mm_features,
        is_alive=lambda request: request in known,
        groups=runner.kv_cache_config.kv_cache_groups,
        has_grids=runner.model_config.uses_mrope,
    )


def batch_of_v2(runner: Any, held: Any) -> Batch:
    """The batch that `vllm.v1.worker.gpu.model_runner.GPUModelRunner` is about to run.

    It keeps no sampling parameters, so `patches` notes the budgets of new requests. It needs
    Triton, and has not run.
    """
    encoders, budgets = runner.encoder_cache, runner.starkv_budgets
    return Batch(
        requests=held.req_ids,
        prompts=runner.req_states.prompt_len.np[held.idx_mapping_np],
        computed=held.num_computed_tokens_np,
        budget=lambda row: budgets.get(held.req_ids[row]),
        features=lambda row: encoders and encoders.mm_features.get(held.req_ids[row]),
        is_alive=lambda request: request in runner.req_states.req_id_to_index,
        groups=runner.kv_cache_config.kv_cache_groups,
        has_grids=runner.model_config.uses_mrope,
    )


def current_batch() -> Batch | None:
    """The batch whose metadata are built now; None for a step without requests."""
    return _batch[-1] if _batch else None


def note_batch(batch: Batch) -> None:
    """Sets the batch of a step that has begun without one."""
    if _batch:
        _batch[-1] = batch


@contextmanager
def entered(batch: Batch | None) -> Iterator[None]:
    """Inside, `current_batch` is `batch`."""
    _batch.append(batch)
    try:
        yield
    finally:
        _batch.pop()
