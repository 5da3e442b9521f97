"""Exports a model of full size without its weights, and measures time and memory.

    python tools/whole_size.py FOLDER [--layers N]

The model has Qwen2-VL-7B's shapes (28 layers, 3584 wide, and its vision tower) in float16. Nothing
writes its parameters, so they take no memory. FOLDER takes 17 GB, because the export of zeros is
complete. The exit code is 1 if a protobuf has 2 GiB or the process took 20 GiB.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.initialization import no_init_weights

from starkv_compile import StarKVConfig
from starkv_compile.export.onnx.package import ExportOptions, export_model

GIB = 1 << 30
MOST_MEMORY, MOST_PROTOBUF = 20 * GIB, 2 * GIB


def config(layers: int) -> Qwen2VLConfig:
    """Returns Qwen2-VL-7B-Instruct's published shapes with `layers` decoder layers."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": layers,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
    }
    vision = {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def without_weights(layers: int) -> torch.nn.Module:
    """Makes the model in float16 and initializes no parameter."""
    torch.set_default_dtype(torch.float16)
    try:
        with no_init_weights():
            return Qwen2VLForConditionalGeneration(config(layers)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


class Stages:
    """Prints the time and memory of the export so far, when its next stage begins."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def __call__(self, stage: str) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(
            f"{time.monotonic() - self.began:5.0f} s, {used.ru_utime + used.ru_stime:5.0f} s of "
            f"processor, {peak() / GIB:5.2f} GiB at most: {stage}",
            flush=True,
        )


def peak() -> int:
    """Returns the most bytes that this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    args = parser.parse_args()
    say = Stages()
    say("model")
    model = without_weights(args.layers)
    with tempfile.TemporaryDirectory() as checkpoint:
        model.config.save_pretrained(checkpoint)
        options = ExportOptions(
            checkpoint=Path(checkpoint),
            out=args.folder,
            config=StarKVConfig(budget=0.2),
            max_seq=32768,
            dtype="float16",
        )
        export_model(model, options, say)
    say("done")
    largest = max(file.stat().st_size for file in args.folder.glob("*.onnx"))
    for file in sorted([*args.folder.glob("*.onnx"), *args.folder.glob("*.data")]):
        print(f"{file.stat().st_size / 1e6:10.1f} MB {file.name}")
    return int(largest >= MOST_PROTOBUF or peak() >= MOST_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
