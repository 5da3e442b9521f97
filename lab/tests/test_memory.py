"""`starkv memory`: the numbers are those of real models and real prompts."""

import json

import pytest
import torch
from starkv_lab.memory.command import chunk_size
from starkv_lab.memory.screens import screen_tokens
from starkv_lab.memory.sizes import ModelSize, Peak
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from starkv_compile import compile
from starkv_compile.cache.size import cache_bytes
from starkv_compile.cli import main
from starkv_compile.hf.cache_argument import with_cache
from starkv_compile.testing import generate, tiny_model
from tests.support.crossing import first_only

SLIDING = MistralConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=16,
    vocab_size=100,
)
MODELS = {
    "qwen2_5_vl": lambda: tiny_model("qwen2_5_vl"),
    "llava": lambda: tiny_model("llava"),
    "sliding windows": lambda: MistralForCausalLM(SLIDING),
}


def read(model, tokens, cache):
    text = model.config.get_text_config(decoder=True)
    with torch.no_grad():
        model.get_decoder()(
            inputs_embeds=torch.zeros(1, tokens, text.hidden_size),
            use_cache=True,
            **with_cache(cache),
        )


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """(a real model, its size)."""
    model = MODELS[request.param]().eval()
    return model, ModelSize(model.config, torch.float32)


def test_weights_and_cache_are_those_of_the_model(pair):
    model, size = pair
    assert size.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    read(model, 29, cache)
    read(model, 1, cache)  # only then a sliding window lets go of what left it
    assert size.cache_bytes(30) == cache_bytes(cache)
    compressed = [layer.token_bytes for layer in size.layers if layer.shortened]
    assert size.cache_bytes(30, 6) == size.cache_bytes(30) - 24 * sum(compressed)
    assert size.cache_bytes(30, 31) == size.cache_bytes(30)


@pytest.mark.parametrize("nbits", [8, 4])
@pytest.mark.parametrize("kept", first_only([5, 40], ci=True))
def test_few_bits_take_what_a_compressed_cache_takes(nbits, kept):
    model = tiny_model("qwen2_5_vl")
    size = ModelSize(model.config, torch.float32)
    compile(model, budget_tokens=kept, nbits=nbits, inner="eager")
    ids = torch.arange(20, 80)[None]
    cache = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 1)
    assert size.cache_bytes(60, kept, nbits) == cache_bytes(cache.past_key_values)


@pytest.mark.parametrize("past", [0, 25])
def test_the_peak_is_that_of_the_real_decoder(pair, past):
    model, size = pair
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if past:
        read(model, past, cache)
    for layer in cache.layers if past else ():
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    peak = Peak([t for layer in cache.layers for t in (layer.keys, layer.values)] if past else [])
    with peak:
        read(model, 40, cache)
    assert size.prompt_bytes(40, past) == peak.nbytes


def test_at_a_budget_a_further_layer_adds_what_it_keeps():
    """As measured on a compiled model by `test_a_further_layer_adds_only_what_it_keeps`."""
    small, large = (
        ModelSize(tiny_model("qwen2_5_vl", num_hidden_layers=layers).config, torch.float32)
        for layers in (2, 5)
    )
    a_token = small.layers[0].token_bytes
    for kept in (None, 40):
        grown = large.prompt_bytes(400, kept=kept) - small.prompt_bytes(400, kept=kept)
        assert grown == 3 * a_token * (kept or 400)
    # In chunks, what is stored has its size again after each layer.
    grown = large.prompt_bytes(100, 40, kept=40) - small.prompt_bytes(100, 40, kept=40)
    assert grown == 3 * a_token * 40


def test_a_peak_counts_what_lives_at_once():
    with Peak() as peak:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = (b.view(10, 100) * 2).add_(1)
    assert peak.nbytes == 8000
    assert c.shape == (10, 100)
    held = [torch.zeros(500)]
    with (peak := Peak(held)):
        held[0] = torch.zeros(400)
        held[0] = torch.zeros(600)
    assert peak.nbytes == 4000, "the 400 and the 600 after the 500 were freed"


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model("qwen2_5_vl").config.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": 64}')
    return tmp_path


@pytest.mark.parametrize(
    ("patch", "pixels", "size", "tokens"),
    [
        (14, {}, (1920, 1080), 2691),  # 1932 x 1092 pixels in squares of 28
        (16, {}, (1920, 1080), 2040),  # 1920 x 1088 in squares of 32
        (14, {"max_pixels": 1003520}, (1920, 1080), 1222),  # 1316 x 728
        (14, {"size": {"longest_edge": 1003520, "shortest_edge": 3136}}, (1920, 1080), 1222),
        (14, {"min_pixels": 313600}, (280, 140), 435),  # 812 x 420
        (14, {}, (10, 10), 4),
    ],
)
def test_tokens_of_a_screenshot(checkpoint, patch, pixels, size, tokens):
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(pixels))
    config = tiny_model("qwen2_5_vl").config
    config.vision_config.patch_size, config.vision_config.spatial_merge_size = patch, 2
    assert screen_tokens(checkpoint, config, *size, most=None) == tokens


def test_limits_in_the_one_file_that_transformers_5_saves(checkpoint):
    (checkpoint / "preprocessor_config.json").unlink()
    said = {"image_processor": {"size": {"longest_edge": 1003520, "shortest_edge": 3136}}}
    (checkpoint / "processor_config.json").write_text(json.dumps(said))
    config = tiny_model("qwen2_5_vl").config
    config.vision_config.patch_size, config.vision_config.spatial_merge_size = 14, 2
    assert screen_tokens(checkpoint, config, 1920, 1080, most=None) == 1222


def model_side(checkpoint):
    vision = json.loads((checkpoint / "config.json").read_text())["vision_config"]
    return vision["patch_size"] * vision["spatial_merge_size"]


def test_the_command(checkpoint, capsys):
    arguments = ["memory", str(checkpoint / "config.json"), "--size", "56x56", "--text", "96"]
    assert main([*arguments, "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    side = model_side(checkpoint)
    tokens = (56 // side) ** 2
    assert lines[1].split()[-2:] == [str(tokens), "tokens"]
    assert lines[3].split()[-2:] == [str(5 * tokens + 96), "tokens"]
    assert "at 20%" in lines[5]
    assert [line[:21].strip() for line in lines[6:8]] == [f"the same in {n} bits" for n in (8, 4)]
    assert lines[9].startswith("the same at 20% ")
    assert "in chunks of" in lines[10]
    assert main([*arguments, "--chunk", "32"]) == 0
    assert "in chunks of 32 " in capsys.readouterr().out


@pytest.mark.parametrize(("screen", "chunk"), [(99, 2048), (2691, 4096), (10549, 16384)])
def test_a_chunk_holds_one_and_a_half_screenshots(screen, chunk):
    assert chunk_size(screen) == chunk


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "1920"], "--size '1920': expected width and height, such as 1920x1080"),
        (["--screens", "-1"], "--screens -1: expected 0 or more"),
        (["--screens", "0", "--text", "1"], "at least 2 tokens"),
        (["--chunk", "0"], "--chunk 0: expected at least 1"),
        (["--budget", "20"], "for 20 percent write 20%"),
    ],
)
def test_mistakes(checkpoint, capsys, arguments, said):
    assert main(["memory", str(checkpoint), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_without_a_model_and_one_that_does_not_say(tmp_path, capsys):
    assert main(["memory", str(tmp_path)]) == 2
    assert "config.json is missing" in capsys.readouterr().err
    tiny_model("llava").config.save_pretrained(tmp_path)
    assert main(["memory", str(tmp_path)]) == 2
    assert "give --tokens-per-screen" in capsys.readouterr().err
    assert main(["memory", str(tmp_path), "--tokens-per-screen", "16"]) == 0
