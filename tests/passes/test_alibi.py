"""A model whose bias counts the keys: left whole, and it is said."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, FalconConfig, FalconForCausalLM

import starkv_compile
from starkv_compile.testing import generate
from tests.support.crossing import slow

SIZES = {"vocab_size": 200, "hidden_size": 64, "eos_token_id": None}


def bloom():
    return BloomForCausalLM(BloomConfig(n_layer=1, n_head=4, **SIZES))


def falcon():
    heads = {"alibi": True, "multi_query": False, "num_attention_heads": 4, "num_hidden_layers": 1}
    return FalconForCausalLM(FalconConfig(new_decoder_architecture=False, **heads, **SIZES))


@pytest.mark.parametrize("make", [bloom, slow(falcon, ci=True)])
def test_a_model_with_alibi_is_left_whole(make):
    torch.manual_seed(0)
    model = make().eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(5, 180, (1, 40))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = generate(model, inputs)
    starkv_compile.compile(model, budget=0.3, inner="eager")
    with pytest.warns(UserWarning, match="ALiBi"):
        output = generate(model, inputs)
    for left, right in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(left, right)
