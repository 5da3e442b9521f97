"""A tiny Qwen3-VL for easy-VQA, trained on its training split in half an hour of a core."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.nn import functional as F

from starkv_compile.agent import initial
from starkv_compile.agent.architecture import build_config
from starkv_compile.agent.batches import IGNORE, Screens
from starkv_compile.agent.train import learning_rate

from .easy_vqa_data import IDS, PATCH, load_split, sample_dialogues

ROWS, QUESTIONS, SILENT = 16, 6, 0.3
STEPS, PEAK = 2000, 2e-3


def build_model(seed: int) -> Any:
    """The agent's architecture, narrower: 4 layers, 4 query heads over 2 KV heads of 32."""
    from transformers import Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    config, hidden = build_config(), 64
    text, vision = config.text_config, config.vision_config
    text.vocab_size, text.hidden_size, text.intermediate_size = len(IDS), hidden, 160
    text.num_attention_heads, text.num_key_value_heads = 4, 2
    vision.hidden_size, vision.intermediate_size, vision.out_hidden_size = 96, 256, hidden
    vision.patch_size = PATCH
    model = Qwen3VLForConditionalGeneration(config)
    initial.start_positions(model.model.visual.pos_embed)
    return model


def predict(model: Any, screens: Screens, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, L, words]."""
    logits: torch.Tensor = model(
        input_ids=input_ids,
        mm_token_type_ids=(input_ids == model.config.image_token_id).int(),
        pixel_values=screens.pixel_values,
        image_grid_thw=screens.grid_thw,
        use_cache=False,
    ).logits
    return logits


def train(steps: int, seed: int) -> Any:
    """A model that has learned from the training split. The rate falls over the last third."""
    split = load_split("train")
    model = build_model(seed).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    for step in track(range(steps), "training"):
        rng = random.Random(f"easy-vqa-{seed}-{step}")
        screens, text = sample_dialogues(rng, split, ROWS, QUESTIONS, SILENT)
        asked = text.labels != IGNORE
        logits = predict(model, screens, text.input_ids)[asked]
        loss = F.cross_entropy(logits, text.labels[asked])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, steps // 3, PEAK)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return model.eval()


def load_or_train(folder: Path, steps: int = STEPS, seed: int = 0) -> tuple[Any, Any]:
    """Two copies of the folder's model; where there is none, one is trained and saved there."""
    from transformers import Qwen3VLForConditionalGeneration

    if not (folder / "model.safetensors").exists():
        train(steps, seed).save_pretrained(folder)
    load = Qwen3VLForConditionalGeneration.from_pretrained
    return load(folder).eval(), load(folder).eval()
