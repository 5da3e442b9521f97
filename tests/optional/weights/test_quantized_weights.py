"""Weights in few bits, by quanto and torchao: starkv compresses the cache all the same."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, QuantoConfig, TorchAoConfig

import starkv_compile
from starkv_compile.testing import generate, tiny_inputs, tiny_model

FAMILY = "qwen2_5_vl"


def quanto(bits):
    pytest.importorskip("optimum.quanto", reason="make test-weights installs it")
    return QuantoConfig(weights=f"int{bits}")


def torchao(name):
    made = pytest.importorskip("torchao.quantization", reason="make test-weights installs it")
    return TorchAoConfig(getattr(made, name)())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "form"),
    [
        (quanto, 8),
        (quanto, 4),
        (torchao, "Int8WeightOnlyConfig"),
        (torchao, "Int8DynamicActivationInt8WeightConfig"),
    ],
)
def test_a_model_with_weights_in_few_bits_is_compressed(package, form, tmp_path):
    config = package(form)
    tiny_model(FAMILY).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=config)
    inputs = tiny_inputs(FAMILY)
    full = generate(model.eval(), inputs)
    starkv_compile.compile(model, budget=0.3, inner="eager")
    out = generate(model, inputs)
    assert torch.equal(out.logits[0], full.logits[0])
    assert starkv_compile.report(model).prompt_graphs[0].rewritten == 2
    seen = inputs["input_ids"].shape[1]
    decoded = out.sequences.shape[1] - seen - 1  # the last token was not read
    assert [x.stored for x in out.past_key_values.layers] == [int(seen * 0.3) + decoded] * 2
