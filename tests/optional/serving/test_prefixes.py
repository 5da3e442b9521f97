"""vLLM's own manager of blocks: which of them a later prompt finds, with groups of two kinds."""

import pytest

pytest.importorskip("vllm", reason="make test-serving installs vLLM")

import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from starkv_compile.serving import register
from starkv_compile.serving.rule import Rule
from starkv_compile.serving.scheduling import compacted

BLOCK = 16
ATTENTION = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}


class Blocks:
    """Blocks of a model with a compacted layer and one with a sliding window of 32 tokens."""

    def __init__(self, **starkv):
        register()
        init_none_hash(sha256)
        self.rule = Rule.of({"budget": 0.2, **starkv})
        specs = [
            compacted(FullAttentionSpec(**ATTENTION), self.rule),
            SlidingWindowSpec(**ATTENTION, sliding_window=32),
        ]
        groups = [KVCacheGroupSpec([str(i)], spec) for i, spec in enumerate(specs)]
        config = KVCacheConfig(num_blocks=200, kv_cache_tensors=[], kv_cache_groups=groups)
        self.manager = KVCacheManager(
            config,
            max_model_len=1000,
            scheduler_block_size=BLOCK,
            hash_block_size=BLOCK,
            max_in_flight_tokens=1000,
        )

    def serve(self, tokens, budget=None, reply=()):
        """The blocks that were found and the blocks that were written, of the sliding window."""
        extra = None if budget is None else {"starkv_budget": budget}
        hasher = get_request_block_hasher(BLOCK, sha256)
        params = SamplingParams(max_tokens=200, extra_args=extra)
        request = Request(str(id(params)), list(tokens), params, None, block_hasher=hasher)
        found, hit, _ = self.manager.get_computed_blocks(request)
        given = {"num_new_computed_tokens": hit, "new_computed_blocks": found}
        written = set()

        def step(tokens, **given):
            assert self.manager.allocate_slots(request, tokens, **given) is not None
            window = self.manager.coordinator.single_type_managers[1]
            written.update(b.block_id for b in window.req_to_blocks[request.request_id])

        start = hit
        while start < request.num_prompt_tokens:
            stop = self.rule.next_stop(start, request.num_prompt_tokens)
            step(stop - start, **given)
            request.num_computed_tokens = start = stop
            given = {}
        for token in reply:
            request.append_output_token_ids(token)
            step(1)
            request.num_computed_tokens += 1
        self.manager.free(request)
        hits = {block.block_id for block in found.blocks[1] if not block.is_null}
        return hit, hits, written - hits


def test_a_window_that_was_computed_after_a_stop_is_not_shared():
    blocks = Blocks(prefill_chunk_size=64)
    _, _, compacted_ones = blocks.serve(range(400))
    first, _, _ = blocks.serve(range(400), 1.0)
    assert first == 48
    hit, found, _ = blocks.serve(range(400), 1.0)
    assert hit == 384
    assert not found & compacted_ones


def test_a_window_of_a_reply_to_a_compacted_prompt_is_not_shared():
    blocks = Blocks()
    _, _, of_the_reply = blocks.serve(range(64), reply=range(64, 150))
    blocks.serve(range(160))
    hit, found, _ = blocks.serve(range(160))
    assert hit == 128
    assert not found & of_the_reply
