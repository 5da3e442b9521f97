"""Export looks at a model's shapes with fake tensors, and leaves none of them in the model."""

import copy

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

import starkv_compile
from starkv_compile import StarKVConfig, UnsupportedModel
from starkv_compile.export.capture.decoder import Decoder, describe
from starkv_compile.export.onnx.package import ExportOptions, export_model
from starkv_compile.export.runner import load_model
from starkv_compile.testing import generate

SHORT = 64
"""Tokens for which the model was trained. Beyond, longrope has other frequencies."""


@pytest.fixture(name="model")
def _model():
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0 + i for i in range(8)],
        "original_max_position_embeddings": SHORT,
    }
    config = Phi3Config(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        max_position_embeddings=512,
        original_max_position_embeddings=SHORT,
        rope_parameters=rope,
        sliding_window=None,
    )
    return Phi3ForCausalLM(config).eval()


def text(tokens):
    return torch.arange(tokens)[None] % 180 + 10


def check(model, untouched):
    for tokens in (SHORT // 2, 2 * SHORT):
        with torch.no_grad():
            assert torch.equal(model(text(tokens)).logits, untouched(text(tokens)).logits)


def test_a_model_that_makes_tensors_at_its_first_call_is_as_it_was(model):
    untouched = copy.deepcopy(model)
    describe(model, Decoder(model))
    assert type(model.model.rotary_emb.long_inv_freq) is torch.Tensor
    check(model, untouched)


def test_so_is_one_that_is_refused(model, monkeypatch):
    def refuse(self, hidden):
        raise RuntimeError("planted")

    untouched = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model.layers[1].mlp), "forward", refuse)
        with pytest.raises(UnsupportedModel, match="planted"):
            describe(model, Decoder(model))
    check(model, untouched)


@pytest.mark.slow
def test_longrope_exports_on_both_sides_of_the_length_it_was_trained_for(model, tmp_path):
    untouched = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "model")
    options = ExportOptions(
        checkpoint=tmp_path / "model",
        out=tmp_path / "out",
        config=StarKVConfig(budget=0.5),
        max_seq=4 * SHORT,
    )
    export_model(model, options, lambda file: None)
    check(model, untouched)
    onnx = load_model(tmp_path / "out")
    starkv_compile.compile(model, budget=0.5, inner="eager")
    for tokens in (SHORT // 2, SHORT - 2, SHORT, 3 * SHORT):
        prompt = {"input_ids": text(tokens), "attention_mask": torch.ones_like(text(tokens))}
        ours, theirs = (generate(one, prompt, 6) for one in (onnx, model))
        assert torch.equal(ours.sequences, theirs.sequences)
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
