"""Trains a tiny Qwen3-VL on easy-VQA's training split, in twenty minutes on one core.

Training has two stages, as the agent's. From answers alone the model would learn in that time what
the questions ask, and nothing about the images. First the vision tower learns to point each token
of a shape at the words for it, and all other tokens at "image". Then the whole model learns to
answer.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from starkv_lab.agent.architecture import build_config
from starkv_lab.agent.batches import IGNORE, Screens
from starkv_lab.training import initial
from starkv_lab.training.train import descend, learning_rate
from torch.nn import functional as F

from .easy_vqa_data import COLORS, IDS, PATCH, SHAPES, SIDE, Split, load_split, sample_dialogues

ROWS, QUESTIONS, SILENT = 16, 6, 0.3
TOWER_ROWS, SHARPNESS = 32, 10.0
TOWER_STEPS, STEPS, PEAK = 1200, 800, 2e-3


def build_model(seed: int) -> Any:
    """Builds the agent's architecture, but narrower: 4 layers, 4 query heads, 2 KV heads of 32."""
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
    """Returns logits [B, L, words]."""
    logits: torch.Tensor = model(
        input_ids=input_ids,
        mm_token_type_ids=(input_ids == model.config.image_token_id).int(),
        pixel_values=screens.pixel_values,
        image_grid_thw=screens.grid_thw,
        use_cache=False,
    ).logits
    return logits


def shown_words(split: Split) -> dict[int, list[int]]:
    """Returns the words for shape and colour of each image whose questions have both as answers."""
    found = {}
    for image, questions in enumerate(split.questions):
        answers = {question.answer for question in questions}
        words = [IDS[word] for word in (*SHAPES, *COLORS) if IDS[word] in answers]
        if len(words) == 2:
            found[image] = words
    return found


def point_loss(model: Any, split: Split, images: list[int], words: list[list[int]]) -> torch.Tensor:
    """Returns the cross entropy of the words that visual tokens point at.

    Shapes and background have the same weight.
    """
    screens = split.screens(images)
    visual = model.model.visual(screens.pixel_values, grid_thw=screens.grid_thw).pooler_output
    table = F.normalize(model.get_input_embeddings().weight, dim=-1)
    logs = (SHARPNESS * F.normalize(visual, dim=-1) @ table.T).log_softmax(-1)
    wanted = torch.tensor(words).repeat_interleave(SIDE**2, 0)
    is_shape = screens.cells[:, 0] > 0
    shape = logs.gather(1, wanted)[is_shape].mean()
    return -shape - logs[~is_shape, IDS["image"]].mean()


class Trainer:
    """Trains a model on the training split. The rate falls in the last third of each stage."""

    def __init__(self, seed: int) -> None:
        self.seed, self.split = seed, load_split("train")
        self.model = build_model(seed).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01
        )

    def train_tower(self, steps: int) -> None:
        shown = shown_words(self.split)
        for step in track(range(steps), "vision tower"):
            rng = random.Random(f"easy-vqa-tower-{self.seed}-{step}")
            images = rng.sample(list(shown), TOWER_ROWS)
            loss = point_loss(self.model, self.split, images, [shown[image] for image in images])
            self._update(loss, step, steps)

    def train_answers(self, steps: int) -> None:
        for step in track(range(steps), "answers"):
            rng = random.Random(f"easy-vqa-{self.seed}-{step}")
            screens, text = sample_dialogues(rng, self.split, ROWS, QUESTIONS, SILENT)
            asked = text.labels != IGNORE
            logits = predict(self.model, screens, text.input_ids)[asked]
            self._update(F.cross_entropy(logits, text.labels[asked]), step, steps)

    def _update(self, loss: torch.Tensor, step: int, steps: int) -> None:
        descend(self.optimizer, loss, learning_rate(step, steps, steps // 3, PEAK))


def load_or_train(folder: Path, seed: int = 0) -> tuple[Any, Any]:
    """Loads two copies of the folder's model. Trains and saves the model if the folder has none."""
    from transformers import Qwen3VLForConditionalGeneration

    if not (folder / "model.safetensors").exists():
        trainer = Trainer(seed)
        trainer.train_tower(TOWER_STEPS)
        trainer.train_answers(STEPS)
        trainer.model.save_pretrained(folder)
    load = Qwen3VLForConditionalGeneration.from_pretrained
    return load(folder).eval(), load(folder).eval()
