"""Layer by layer: of the prompt's keys and values, only one layer's are whole at a time."""

import pytest
import torch
from starkv_lab.environment import peak_bytes as most_held
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import starkv_compile
from starkv_compile import StarKVConfig
from tests.support.crossing import slow

LENGTH, HEADS, DIM = 2000, 8, 64
WHOLE_LAYER = 2 * HEADS * DIM * LENGTH * 4  # bytes of one layer's keys and values


def mostly_cache(layers):
    """A model whose keys and values are most of what a prompt allocates."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 64,
        "head_dim": DIM,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [],
    }
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision)
    ).eval()


def peak_bytes(layers, config):
    """Of a prompt, once compiled."""
    torch._dynamo.reset()
    model = mostly_cache(layers)
    starkv_compile.compile(model, config)
    prompt = torch.arange(LENGTH)[None] % 100

    def run():
        with torch.no_grad():
            return model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values

    assert len(run().layers) == layers
    return most_held(run)


@pytest.mark.parametrize(
    ("inner", "budget", "low", "high"),
    [
        slow("eager", 1.0, 0.99, 1.01),
        slow("eager", 0.1, 0.09, 0.11, ci=True),
        slow("inductor", 0.1, 0.09, 0.2),
    ],
)
def test_a_further_layer_adds_only_what_it_keeps(inner, budget, low, high):
    """Three more layers raise the peak by their kept tokens alone; at budget 1.0, by all."""
    policy = "snapkv_mean" if inner == "inductor" else "screen_novelty"  # compiles sooner
    config = StarKVConfig(budget=budget, policy=policy, inner=inner)
    added = (peak_bytes(5, config) - peak_bytes(2, config)) / 3
    assert low < added / WHOLE_LAYER < high
