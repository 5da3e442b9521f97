"""The scheduler's side: which blocks are freed, and which requests may share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from .rule import Rule, budget_of


@dataclass(frozen=True, kw_only=True)
class CompactedSpec(FullAttentionSpec):
    """A layer of full attention whose prompts are compacted.

    Specs travel from the workers to the scheduler, so both have the same rule.
    """

    rule: str = ""

    @classmethod
    def merge(cls, specs: Sequence[CompactedSpec]) -> CompactedSpec:
        # vLLM asks whether specs can be merged, and takes an assertion for a no.
        assert all(isinstance(spec, CompactedSpec) for spec in specs), "other layers are apart"
        rules = {spec.rule for spec in specs}
        assert len(rules) == 1, "an engine has one rule"
        return _with_rule(FullAttentionSpec.merge(specs), rules.pop())


def _with_rule(spec: Any, rule: str) -> CompactedSpec:
    named = {field.name: getattr(spec, field.name) for field in fields(FullAttentionSpec)}
    return CompactedSpec(**named, rule=rule)


def compacted(spec: Any, rule: Rule) -> Any:
    """The spec of a layer, compacted by `rule` if every token sees all tokens before it."""
    sees_all = (
        type(spec) is FullAttentionSpec
        and spec.sliding_window is None
        and spec.attention_chunk_size is None
        and not spec.non_causal
    )
    return _with_rule(spec, rule.dumps()) if sees_all else spec


_looked_up: list[Any] = []
"""The request whose prefix is looked up now. vLLM does not tell it to `find_longest_cache_hit`."""


@contextmanager
def looked_up(request: Any) -> Iterator[None]:
    _looked_up.append(request)
    try:
        yield
    finally:
        _looked_up.pop()


class CompactingManager(FullAttentionManager):
    """Frees the first blocks of a prompt once it is compacted.

    The blocks after these hold other tokens than their hashes would say, so they are never shared:
    they are not hashed, and a hit ends before them.

    Attributes:
        rule: the engine's rule.
        delay: how many steps later than its compaction a prompt's blocks are freed.
        noted: length and budget of the prompts whose blocks are here.
    """

    def __init__(self, kv_cache_spec: CompactedSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.rule = Rule.loads(kv_cache_spec.rule)
        self.delay = 0
        self.noted: dict[str, tuple[int, Fraction | None]] = {}

    def note(self, request: Any) -> None:
        """Remembers a request's length and budget until its blocks are freed."""
        budget = budget_of(request.sampling_params)
        self.noted[request.request_id] = request.num_prompt_tokens, budget

    max_admission_blocks_per_request: int | None

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        # A prompt that is also compacted while it is read never needs all of its blocks at once.
        if request_id in self.noted and kwargs.get("apply_admission_cap"):
            length, budget = self.noted[request_id]
            self.max_admission_blocks_per_request = self.rule.most_blocks(
                length, num_tokens, self.block_size, budget, self.delay
            )
        try:
            return super().get_num_blocks_to_allocate(request_id, num_tokens, *args, **kwargs)
        finally:
            self.max_admission_blocks_per_request = None

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        if request_id not in self.noted:
            return
        length, budget = self.noted[request_id]
        # Tokens of a step that has not come back are not among these.
        gone = self.rule.gone(processed_computed_tokens, length, self.block_size, budget)
        self._remove_blocks_in_range(request_id, 0, gone // self.block_size)

    def first_drop(self, request: Any) -> int | None:
        """After how many tokens all that is computed is the request's own; None: never."""
        budget = budget_of(request.sampling_params)
        return self.rule.first_drop(request.num_prompt_tokens, self.block_size, budget)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        budget = budget_of(request.sampling_params)
        shared = self.rule.shared(request.num_prompt_tokens, self.block_size, budget)
        super().cache_blocks(
            request, num_tokens if shared is None else min(num_tokens, shared), *args, **kwargs
        )

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # `max_length` counts the outputs of a preempted request, too.
        request = _looked_up[-1] if _looked_up else None
        length = max_length + 1 if request is None else request.num_prompt_tokens
        budget = None if request is None else budget_of(request.sampling_params)
        shared = Rule.loads(kv_cache_spec.rule).shared(length, kv_cache_spec.block_size, budget)
        return super().find_longest_cache_hit(
            block_hashes,
            max_length if shared is None else min(max_length, shared),
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            *args,
            **kwargs,
        )

    def pop_blocks_for_free(self, request_id: str) -> Any:
        self.noted.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


def register_spec() -> None:
    """Registers the spec and its manager."""
    # Once one is registered, vLLM believes that its own are, too.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(
        CompactedSpec, CompactingManager, uniform_type_base_spec=FullAttentionSpec
    )
