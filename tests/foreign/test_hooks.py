"""Hooks of accelerate around layers, as `device_map` puts them on when it spreads or offloads."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

import starkv_compile
from starkv_compile import StarKVCache
from starkv_compile.testing import generate, tiny_inputs, tiny_model

FAMILY = "qwen2_5_vl"


def around_layers(model, folder):
    for layer in model.get_decoder().layers:
        add_hook_to_module(layer, AlignDevicesHook(io_same_device=True))


def on_the_host(model, folder):
    cpu_offload(model, execution_device="cpu")


def on_disk(model, folder):
    disk_offload(model, folder, execution_device="cpu")


@pytest.fixture(scope="module")
def expected():
    model = starkv_compile.compile(tiny_model(FAMILY), budget=0.3, inner="eager")
    return generate(model, tiny_inputs(FAMILY), tokens=2)


@pytest.mark.slow
@pytest.mark.parametrize("put_on", [around_layers, on_the_host, on_disk])
def test_a_model_with_hooks_is_compressed_as_without(put_on, expected, tmp_path):
    """Each hook breaks Dynamo's graph, so each layer has a graph of its own."""
    model = tiny_model(FAMILY)
    put_on(model, tmp_path)
    starkv_compile.compile(model, budget=0.3, inner="eager")
    out = generate(model, tiny_inputs(FAMILY), tokens=2)
    assert isinstance(out.past_key_values, StarKVCache)
    assert torch.equal(out.sequences, expected.sequences)
    caches = (out.past_key_values.layers, expected.past_key_values.layers)
    for ours, theirs in zip(*caches, strict=True):
        assert torch.equal(ours.kept, theirs.kept)
    report = starkv_compile.report(model)
    assert not report.refusals
    assert all(graph.rewritten == 1 for graph in report.prompt_graphs)
