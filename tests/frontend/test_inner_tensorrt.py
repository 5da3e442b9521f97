"""`inner="tensorrt"`: rewritten graphs reach torch-tensorrt's backend; without it, one error."""

import sys
from types import ModuleType

import pytest
import torch
from torch._dynamo.backends import registry
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

import starkv_compile
from starkv_compile.errors import MissingPackage
from starkv_compile.testing import generate, tiny_inputs, tiny_model

Q, K, V = (torch.randn(1, 2, 40, 16) for _ in range(3))
OPTIONS = {"budget": 0.25, "inner": "tensorrt"}


def attend(q, k, v):
    k, v = k * 1.5, v * 1.5
    return F.scaled_dot_product_attention(q, k, v, is_causal=True), k, v


@pytest.fixture
def given(monkeypatch):
    """Graphs that a stand-in for torch-tensorrt is given; it runs them as they are."""
    graphs = []

    def backend(module, example_inputs, *, options):
        assert not options["attn_bias_is_causal"], "masks of padded rows would be lost"
        assert options["disable_tf32"]
        graphs.append(module)
        return module.forward

    monkeypatch.setitem(sys.modules, "torch_tensorrt", ModuleType("torch_tensorrt"))
    monkeypatch.setitem(registry._BACKENDS, "torch_tensorrt", None)
    monkeypatch.setitem(registry._COMPILER_FNS, "torch_tensorrt", backend)
    return graphs


def test_the_two_backends_stack(given):
    options = {**OPTIONS, "shorten_outputs": True}
    out, key, _ = torch.compile(attend, backend="starkv", options=options, fullgraph=True)(Q, K, V)
    torch.testing.assert_close(out, attend(Q, K, V)[0])
    assert key.shape[2] == 10
    targets = {str(node.target) for graph in given for node in graph.graph.nodes}
    assert any("starkv.select_tokens" in target for target in targets)


@pytest.mark.slow(ci=True)
def test_a_model_is_compressed_through_it_as_without(given):
    inputs = tiny_inputs("qwen2_vl")
    found = []
    for inner in ("tensorrt", "eager"):
        model = starkv_compile.compile(tiny_model("qwen2_vl"), budget=0.3, inner=inner)
        found.append(generate(model, inputs))
    assert given
    mine, theirs = found
    assert torch.equal(mine.sequences, theirs.sequences)
    for a, b in zip(mine.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        assert torch.equal(a.keys, b.keys)


def test_what_is_missing_is_said_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    model = tiny_model("qwen2_vl")
    said = r"torch_tensorrt cannot be imported \(.*\); .*pip install '.\[tensorrt-"
    with pytest.raises(MissingPackage, match=said):
        starkv_compile.compile(model, **OPTIONS)
    with pytest.raises(MissingPackage, match=said):
        torch.compile(model, backend="starkv", options=OPTIONS)
    assert not starkv_compile.undo(model), "it was left as it is"
    with pytest.raises(BackendCompilerFailed, match=said):  # a function has no earlier moment
        torch.compile(attend, backend="starkv", options=OPTIONS)(Q, K, V)
