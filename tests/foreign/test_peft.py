"""A LoRA adapter put on before or after compiling, switched off and on, and merged."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import starkv_compile
from starkv_compile import StarKVCache
from tests.foreign.core import LAYERS, PROMPT, filled
from tests.foreign.styles import LLAMA
from tests.support.crossing import slow

KEPT = PROMPT.shape[1] * 3 // 10


def base():
    return filled(LlamaForCausalLM(LlamaConfig(**LLAMA)))


def adapted(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, config).eval()


def compressed(model):
    return starkv_compile.compile(model, budget=0.3, inner="eager")


@torch.no_grad()
def answered(model):
    """The logits of the last token of a prompt, and the tokens stored of it."""
    output = model(input_ids=PROMPT, use_cache=True)
    stored = [layer.keys.shape[2] for layer in output.cache.layers]
    assert output.cache.get_seq_length() == PROMPT.shape[1]
    return output.logits[:, -1], stored, output.cache


def assert_compressed(model, expected):
    logits, stored, cache = answered(model)
    assert isinstance(cache, StarKVCache)
    assert stored == [KEPT] * LAYERS
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def right():
    """The last logits without and with the adapter, uncompressed."""
    plain, _, _ = answered(base())
    with_adapter, _, _ = answered(adapted(base()))
    assert not torch.allclose(plain, with_adapter)
    return plain, with_adapter


@pytest.mark.slow(ci=True)
def test_an_adapter_put_on_a_compiled_model(right):
    plain, with_adapter = right
    model = compressed(base())
    assert_compressed(model, plain)
    wrapper = adapted(model)
    assert_compressed(wrapper, with_adapter)
    with wrapper.disable_adapter():
        assert_compressed(wrapper, plain)
    assert_compressed(wrapper, with_adapter)
    assert starkv_compile.report(wrapper) is starkv_compile.report(model)
    merged = wrapper.merge_and_unload()
    assert_compressed(merged, with_adapter)
    assert starkv_compile.undo(merged)
    _, stored, _ = answered(merged)
    assert stored == [PROMPT.shape[1]] * LAYERS


@pytest.mark.parametrize(
    "way", ["compile", "torch.compile", "model.compile", slow("the model inside", ci=True)]
)
def test_a_wrapper_that_is_compiled(right, way):
    _, with_adapter = right
    wrapper = adapted(base())
    how = {"backend": "starkv", "options": {"budget": 0.3, "inner": "eager"}}
    entry = wrapper
    if way == "torch.compile":
        entry = torch.compile(wrapper, **how)
    elif way == "model.compile":
        wrapper.compile(**how)
    else:
        compressed(wrapper if way == "compile" else wrapper.get_base_model())
    assert_compressed(entry, with_adapter)
    assert starkv_compile.undo(wrapper)
    logits, stored, _ = answered(wrapper)
    assert stored == [PROMPT.shape[1]] * LAYERS
    assert torch.equal(logits, with_adapter)
