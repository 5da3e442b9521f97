"""A step is planned before the last one has come back. vLLM for CPUs switches that off."""

import contextlib

import pytest
import torch

pytest.importorskip("vllm", reason="make test-serving installs vLLM")

from benchmarks.engines import engine


class Nothing:
    """A stream or an event: on a CPU, everything has happened when a call returns."""

    def __init__(self, *args, **options):
        pass

    def __getattr__(self, name):
        return lambda *args, **options: None


@pytest.fixture
def switch_on(monkeypatch):
    """From its call on, engines plan ahead. Their step is vLLM's own, with nothing to wait for."""
    from vllm.platforms.cpu import CpuPlatform

    as_installed = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config):
        as_installed(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    def switch():
        forced = staticmethod(check_and_update_config)
        monkeypatch.setattr(CpuPlatform, "check_and_update_config", forced)
        for owner, name in ((torch.cuda, "Stream"), (torch.cuda, "Event"), (torch, "Event")):
            monkeypatch.setattr(owner, name, Nothing)
        monkeypatch.setattr(torch.cuda, "current_stream", Nothing)
        monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)

    return switch


@pytest.mark.parametrize(
    "stops", [{}, {"prefill_chunk_size": 96}], ids=["at the end", "with stops"]
)
@pytest.mark.parametrize("policy", ["screen_novelty", "snapkv"])
def test_replies_are_the_same(folder, asked, stops, policy, switch_on):
    starkv = {"budget": 0.2, "policy": policy, **stops}
    budgets = [[1.0, 0.5, 0.2][i % 3] for i in range(12)]
    with engine(folder, starkv) as fresh:
        replies = fresh.tokens(asked[0], budgets)
    switch_on()
    crowded = {
        "enable_prefix_caching": True,
        "num_gpu_blocks_override": 50,
        "max_num_batched_tokens": 4096,
        "long_prefill_token_threshold": 80,
        "max_num_seqs": 16,
    }
    for options in ({}, crowded):
        with engine(folder, starkv, **options) as made:
            assert type(made.scheduler).__name__ == "AsyncScheduler"
            assert made.tokens(asked[0], budgets) == replies
            assert made.blocks_in_use == 0
            assert made.preempted or not options
