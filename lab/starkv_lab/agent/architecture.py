"""Builds the demo agent's configuration, tokenizer and image processor.

The agent is a stock Qwen3-VL of 2.5 M parameters. Nothing here subclasses or patches a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .render import CELL
from .vocabulary import (
    END,
    IMAGE,
    PAD,
    SPECIAL_TOKENS,
    TOKEN_ID,
    TOKENS,
    UNKNOWN,
    VIDEO,
    VISION_END,
    VISION_START,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3VLConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)
MAX_VISUAL_TOKENS = 112

# One turn is `<|user|>...<|agent|>...<|end|>`. An image is a placeholder between two markers.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|agent|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %} {% endfor %}{% endif %}"
    "{% if message['role'] != 'user' %}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|agent|>{% endif %}"
)


def build_config() -> Qwen3VLConfig:
    """Makes a small Qwen3-VL: 4 layers, 8 query heads, 4 KV heads of 32, one token per patch."""
    from transformers import Qwen3VLConfig

    hidden = 128
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(TOKENS),
            "hidden_size": hidden,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 8192,
            "initializer_range": 0.06,  # 0.02 suits wide models; this narrow one would learn slowly
            "attention_bias": True,  # with it a head can look a fixed distance back
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "pad_token_id": TOKEN_ID[PAD],
            "eos_token_id": TOKEN_ID[END],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_heads": 4,
            "patch_size": CELL,
            "spatial_merge_size": 1,
            "temporal_patch_size": 1,
            "out_hidden_size": hidden,
            "num_position_embeddings": 1024,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=TOKEN_ID[IMAGE],
        video_token_id=TOKEN_ID[VIDEO],
        vision_start_token_id=TOKEN_ID[VISION_START],
        vision_end_token_id=TOKEN_ID[VISION_END],
        tie_word_embeddings=True,
    )
    config.text_config.tie_word_embeddings = True
    return config


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Makes one token of each word of `vocabulary.TOKENS`. Words are split at white space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(TOKEN_ID, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in (PAD, END)],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Makes Qwen-VL's image processor in its PIL form, which needs no torchvision."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=CELL,
        merge_size=1,
        temporal_patch_size=1,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
        size={"shortest_edge": 36 * CELL**2, "longest_edge": MAX_VISUAL_TOKENS * CELL**2},
    )
