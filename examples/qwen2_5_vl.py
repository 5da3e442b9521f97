"""Asks UI-TARS or any Qwen2.5-VL about a screenshot, with a compressed cache.

    python examples/qwen2_5_vl.py screenshot.png "Where is the search field?"
    python examples/qwen2_5_vl.py screenshot.png --model Qwen/Qwen2.5-VL-3B-Instruct

The first run downloads the checkpoint. Qwen2-VL and Qwen3-VL checkpoints work the same way.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

import starkv_compile
from starkv_compile.cli import share_of

CHECKPOINT = "ByteDance-Seed/UI-TARS-1.5-7B"  # a Qwen2.5-VL


def load(name: str) -> tuple[Any, Any]:
    """Returns (model, processor) from a checkpoint's name or folder."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto").eval().to(device)
    return model, AutoProcessor.from_pretrained(name)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=("Asks about a screenshot, with a compressed cache.")
    )
    parser.add_argument("image", help="path of the screenshot")
    parser.add_argument("question", nargs="?", default="Describe what is on this screen.")
    parser.add_argument("--model", default=CHECKPOINT)
    parser.add_argument("--budget", default="0.2", help="share of the tokens: 0.2 or 20%%")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of the answer")
    parser.add_argument("--inner", default="inductor", help='"eager" needs no C++ compiler')
    args = parser.parse_args(argv)

    model, processor = load(args.model)
    starkv_compile.compile(model, budget=share_of(args.budget), inner=args.inner)

    image = Image.open(args.image).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": args.question}]
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[image], return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False)
    answer = output[:, inputs["input_ids"].shape[1] :]

    print(processor.batch_decode(answer, skip_special_tokens=True)[0])
    print(starkv_compile.report(model))


if __name__ == "__main__":
    main()
