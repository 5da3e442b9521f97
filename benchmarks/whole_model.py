"""Compares a full cache with ours on a whole model: `python -m benchmarks.whole_model`.

The model has random weights. The command measures the time to the first token, the decoding rate at
several batch sizes, the bytes of the cache, and the peak memory. Full-size shapes need a GPU with
40 GB or more. `--tiny` runs the same code on any machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from starkv_lab.environment import environment, peak_bytes
from transformers import AutoConfig, AutoModelForImageTextToText

import starkv_compile
from starkv_compile import StarKVConfig
from starkv_compile.cache.size import cache_bytes
from starkv_compile.cli import share_of

from .layers import SCREENS, TEXT

VISION_START, VISION_END, IMAGE = 151652, 151653, 151655
FAMILIES, MERGE = ("qwen2_5_vl", "qwen3_vl"), 2


def full_size(name: str) -> Any:
    """Returns the published configuration of Qwen2.5-VL-7B or Qwen3-VL-8B."""
    if name == "qwen2_5_vl":
        return AutoConfig.for_model(
            name,
            text_config={
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "vocab_size": 152064,
                "max_position_embeddings": 128000,
                "max_window_layers": 28,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [16, 24, 24],
                },
            },
            vision_config={"out_hidden_size": 3584},
        )
    return AutoConfig.for_model(
        name,
        text_config={
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision_config={"hidden_size": 1152, "depth": 27, "out_hidden_size": 4096},
    )


def tiny(name: str) -> Any:
    """Returns the same family with two narrow layers and its whole vocabulary."""
    config = full_size(name)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 64, 64, 2
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, 2, 16
    text.layer_types = ["full_attention"] * 2
    text.rope_parameters["mrope_section"] = [4, 2, 2]
    vision = config.vision_config
    vision.hidden_size, vision.intermediate_size, vision.depth, vision.num_heads = 32, 32, 2, 2
    vision.out_hidden_size = 64
    if name == "qwen2_5_vl":
        vision.fullatt_block_indexes = [1]
    else:
        vision.deepstack_visual_indexes = [0]
    return config


@torch.no_grad()
def random_model(config: Any, device: str, dtype: torch.dtype) -> Any:
    """Makes a model and draws its weights on the device, so that they never fill the host."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") or ".norm" in name:
            parameter.fill_(1.0) if name.endswith("weight") else parameter.zero_()
        else:
            parameter.normal_(std=0.02)
    for module in model.modules():  # rotary tables are computed, not drawn
        if hasattr(module, "inv_freq"):
            fresh = type(module)(*_rotary_arguments(module))
            module.inv_freq = fresh.inv_freq.to(device)
            if hasattr(module, "original_inv_freq"):
                module.original_inv_freq = module.inv_freq
    return model.eval()


def _rotary_arguments(module: Any) -> tuple[Any, ...]:
    return (module.config,) if hasattr(module, "config") else (module.dim,)


def prompt(config: Any, screen: str, frames: int, batch: int, device: str) -> dict[str, Any]:
    """Makes `frames` screenshots of random pixels, then text. All rows are the same."""
    rows, columns = SCREENS[screen]
    vision = config.vision_config
    size = vision.patch_size**2 * vision.in_channels * vision.temporal_patch_size
    frame = [config.vision_start_token_id, *[config.image_token_id] * (rows * columns)]
    frame += [config.vision_end_token_id]
    ids = [*range(100, 100 + TEXT), *frame * frames, *range(100, 100 + TEXT)]
    input_ids = torch.tensor([ids] * batch, device=device)
    grid = torch.tensor([[1, rows * MERGE, columns * MERGE]] * (frames * batch), device=device)
    pixels = torch.randn(int(grid.prod(-1).sum()), size, device=device)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == config.image_token_id).int(),
        "pixel_values": pixels,
        "image_grid_thw": grid,
    }


@dataclass(frozen=True)
class Run:
    """Holds seconds to the first token, tokens per second after it, and bytes of cache and peak."""

    first: float
    rate: float
    cache: int
    peak: int


def measure(model: Any, inputs: dict[str, Any], new_tokens: int, rounds: int) -> Run:
    """Measures medians over `rounds`, after one run that compiles."""
    device = inputs["input_ids"].device.type
    batch = len(inputs["input_ids"])

    def run(tokens: int) -> tuple[float, Any]:
        _wait(device)
        start = time.perf_counter()
        out = model.generate(
            **inputs,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        _wait(device)
        return time.perf_counter() - start, out.past_key_values

    with torch.no_grad():
        run(new_tokens)
        first = statistics.median(run(1)[0] for _ in range(rounds))
        whole = statistics.median(run(new_tokens)[0] for _ in range(rounds))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            run(1)
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = peak_bytes(lambda: run(1))
        cache = run(1)[1]
    return Run(first, batch * (new_tokens - 1) / (whole - first), cache_bytes(cache), peak)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=FAMILIES, default="qwen2_5_vl")
    parser.add_argument("--tiny", action="store_true", help="use two narrow layers")
    parser.add_argument("--screen", choices=SCREENS, default="1440p")
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--budget", default="0.2", help="share of the tokens: 0.2 or 20%%")
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inner", default="inductor")
    args = parser.parse_args()
    share = share_of(args.budget)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = (tiny if args.tiny else full_size)(args.model)
    config.image_token_id, config.vision_start_token_id = IMAGE, VISION_START
    config.vision_end_token_id = VISION_END
    model = random_model(config, device, dtype)
    print(environment(device))
    print(
        f"{'batch':>5s} {'budget':>6s} {'first token s':>13s} {'tokens/s':>9s} "
        f"{'cache MB':>9s} {'peak MB':>9s}"
    )
    for batch in args.batch:
        inputs = prompt(config, args.screen, args.frames, batch, device)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        found = {}
        for budget in (1.0, share):
            starkv_compile.compile(model, StarKVConfig(budget=budget, inner=args.inner))
            found[budget] = run = measure(model, inputs, args.new_tokens, args.rounds)
            starkv_compile.undo(model)
            torch._dynamo.reset()
            print(
                f"{batch:5d} {budget:6.2f} {run.first:13.3f} {run.rate:9.1f} "
                f"{run.cache / 1e6:9.1f} {run.peak / 1e6:9.1f}",
                flush=True,
            )
        full, ours = found[1.0], found[share]
        print(
            f"ratio {'':6s} {ours.first / full.first:13.3f} {ours.rate / full.rate:9.2f} "
            f"{ours.cache / full.cache:9.3f} {ours.peak / full.peak:9.3f}"
        )


if __name__ == "__main__":
    main()
