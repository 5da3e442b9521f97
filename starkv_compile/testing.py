"""Tiny random models of real architectures, and inputs for them. For tests and examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

VOCABULARY = 200
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END, PAD = 190, 191, 192, 193, 0

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava")
LAYERS = 2


def tiny_model(family: str, seed: int = 0, **text: Any) -> Any:
    """A random model of `family`, float32, in eval mode. `text` changes the text config."""
    torch.manual_seed(seed)
    model = _BUILDERS[family]({**_TEXT, **text}).eval()
    model.generation_config.eos_token_id = None
    return model


def _qwen2_vl(text: dict[str, Any]) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {
        "depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    text = {**text, "rope_parameters": _MROPE}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, **_TOKENS)
    )


def _qwen2_5_vl(text: dict[str, Any]) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64,
        "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = {**text, "rope_parameters": _MROPE}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_TOKENS)
    )


def _qwen3_vl(text: dict[str, Any]) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = {
        **text,
        "head_dim": 16,
        "rope_parameters": {**_MROPE, "mrope_interleaved": True},
    }
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, **_TOKENS)
    )


def _llava(text: dict[str, Any]) -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=4, projection_dim=32,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    return LlavaForConditionalGeneration(config)


_BUILDERS = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava": _llava,
}


@dataclass(frozen=True)
class Prompt:
    """A prompt of frames, each between two markers, then random text.

    grids: (rows, columns) of each frame in merged tokens; LLaVA's are always 4 x 4.
    """

    grids: Sequence[tuple[int, int]] = ((4, 4), (4, 4))
    text: int = 30
    seed: int = 0

    def token_ids(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed)
        ids = [5, 6]
        for rows, columns in self.grids:
            ids += [VISION_START, *[IMAGE_TOKEN] * (rows * columns), VISION_END]
        return ids + torch.randint(10, 180, (self.text,), generator=generator).tolist()


def tiny_inputs(family: str, *prompts: Prompt) -> dict[str, torch.Tensor]:
    """Model inputs for a batch of prompts, padded on the left."""
    prompts = prompts or (Prompt(),)
    rows = [prompt.token_ids() for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    grids = [grid for prompt in prompts for grid in prompt.grids]
    generator = torch.Generator().manual_seed(prompts[0].seed)
    if family == "llava":
        if grids:
            inputs["pixel_values"] = torch.randn(len(grids), 3, 16, 16, generator=generator)
        return inputs
    inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    if grids:
        patches = [torch.randn(4 * r * c, 3 * 2 * 4 * 4, generator=generator) for r, c in grids]
        inputs["pixel_values"] = torch.cat(patches)
        inputs["image_grid_thw"] = torch.tensor([[1, 2 * r, 2 * c] for r, c in grids])
    return inputs


def generate(model: Any, inputs: dict[str, torch.Tensor], tokens: int = 4, **more: Any) -> Any:
    """Greedy `generate` with logits and the cache."""
    with torch.no_grad():
        return model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True,
            output_logits=True, **more,
        )  # fmt: skip
