"""Half precision: which tokens are kept, and how far logits are from the compiled model's."""

import pytest
import torch

from starkv_compile import StarKVError
from starkv_compile.export import runner, runtime
from starkv_compile.testing import TinyPrompt, generate, tiny_inputs

PROMPTS = [
    [TinyPrompt(((4, 4), (3, 5)), text=20)],
    [TinyPrompt(((4, 4), (2, 3), (5, 5), (4, 6)), text=150)],
    [TinyPrompt(((4, 4),), text=20), TinyPrompt(((4, 4),), text=20, seed=1)],
    [TinyPrompt(((4, 4),), text=9), TinyPrompt(((3, 4), (5, 5)), text=30)],
]


def compared(model, exported):
    """Share of kept tokens that both keep, and the largest difference of logits.

    Once two sessions keep different tokens their replies are of different pasts: then the prompt's
    logits alone are looked at.
    """
    kept = shared = 0
    apart = 0.0
    for prompts in PROMPTS:
        inputs = tiny_inputs(exported.family, *prompts)
        mine, theirs = (generate(m, inputs) for m in (model, exported.compiled))
        left, right = (o.past_key_values.compressed_layers[0].kept.tolist() for o in (mine, theirs))
        kept += sum(map(len, right))
        shared += sum(len({*a} & {*b}) for a, b in zip(left, right, strict=True))
        pairs = list(zip(mine.logits, theirs.logits, strict=True))
        for a, b in pairs if left == right else pairs[:1]:
            apart = max(apart, float((a - b).abs().max()))
    return shared / kept, apart


@pytest.mark.slow
def test_float16(exports):
    exported = exports("float16")
    same, apart = compared(exported.onnx, exported)
    assert same >= 0.99
    assert apart < 0.002, "of logits up to 0.6"
    layer = generate(exported.onnx, tiny_inputs(exported.family)).past_key_values.layers[0]
    assert layer.keys.dtype == torch.float16


@pytest.mark.slow
def test_bfloat16(exports, monkeypatch):
    """ONNX Runtime has no bfloat16 on CPUs, and says so; ONNX's evaluator rounds every step."""
    exported = exports("bfloat16")
    with pytest.raises(StarKVError, match="bfloat16 needs provider 'cuda'"):
        runner.load_model(exported.folder)
    from tests.support.reference import ReferenceGraph

    for module in (runner, runtime):
        monkeypatch.setattr(module, "open_graph", ReferenceGraph)
    same, apart = compared(runner.load_model(exported.folder), exported)
    assert same >= 0.96
    assert apart < 0.02, "of logits up to 0.6"
