"""Qwen3-VL's processor without its video part, which needs torchvision."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from .vocabulary import IMAGE


class AgentProcessor(Qwen3VLProcessor):
    """Turns text and screenshots into the inputs of a Qwen3-VL, as its own processor does.

    `processor(text=[...], images=[...], return_tensors="pt")` gives `input_ids` [B, L],
    `attention_mask` [B, L], `mm_token_type_ids` [B, L], `pixel_values` [patches, 3*32*32] and
    `image_grid_thw` [images, 3].
    """

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None):
        self.image_token, self.video_token = IMAGE, "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
