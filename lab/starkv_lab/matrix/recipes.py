"""Data that single families need in addition to a capped default configuration."""

from __future__ import annotations

from typing import Any

TEXT_FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "mistral",
    "phi3",
    "deepseek_v3",
    "gpt_oss",
    "phi4_multimodal",
)
"""Text decoders inside many VLMs. `qwen2` has 1-D positions, as OpenCUA's layout has."""

BEFORE, BETWEEN, AFTER = 7, 6, 30  # words of a prompt, around and between its two images
WORDS = BEFORE + BETWEEN + AFTER  # words of a prompt without image tokens
MROPE_SECTION = [2, 3, 3]  # parts of half a head of 16: time, height, width
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": MROPE_SECTION}
_EVEN_HEADS = {"num_key_value_heads": 4, "head_dim": 8}  # for families that cache latents
_HALF_MROPE = {**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
CONFIG: dict[str, dict[str, Any]] = {
    **{
        family: {"text_config": {"rope_parameters": _MROPE}}
        for family in ("qwen2_vl", "qwen2_5_vl", "paddleocr_vl")
    },
    **{
        family: {"text_config": {"rope_parameters": _HALF_MROPE}}
        for family in ("glm4v", "glm46v", "glm_ocr", "glmga", "glm4v_moe")
    },
    "llava": {"vision_feature_layer": -1, "image_seq_length": 16},
    "vipllava": {"vision_feature_layers": [-1, -1], "image_seq_length": 16},
    "deepseek_v3": _EVEN_HEADS,
    "kimi_k25": {"text_config": _EVEN_HEADS, "projection_hidden_size": 64},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _MROPE}}},
    "deepseek_ocr2": {
        "text_config": {
            "mlp_layer_types": ["dense", "sparse"],
            "num_experts_per_tok": 2,
            "num_key_value_heads": 2,
            "n_group": 1,
            "topk_group": 1,
        },
        "vision_config": {
            "sam_config": {
                "downsample_channels": [32, 64],
                "output_channels": 32,
                "image_size": 256,
                "patch_size": 16,
                "global_attn_indexes": [0],
            },
            "encoder_config": {"hidden_size": 64},
        },
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": 299,
            "<|extra_200|>": 298,
            **{f"<|visual token {i:06d}|>": 201 + i for i in range(64)},
        },
    },
    "gemma4": {
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "patch_size": 4,
            "position_embedding_size": 64,
        },
    },
    "granite4_vision": {
        "downsample_rate": "2/4",
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [],
        "vision_feature_layer": -1,
        "image_seq_length": 4,
    },
    "hunyuan_vl": {
        "text_config": {
            "head_dim": 16,
            "rope_parameters": {**_MROPE, "mrope_section": [2, 2, 2, 2]},
        },
    },
    "kosmos-2": {"latent_query_num": 8},
    "mistral_large4": {"text_config": _EVEN_HEADS},
    "mistral4": {"num_key_value_heads": 4},
    "hy_v4_vl": {
        "text_config": {
            **_EVEN_HEADS,
            "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]},
        },
    },
    "apertus1p5": {  # its vocabulary has images and sounds after the text
        "image_token_offset": 201,
        "audio_token_offset": 265,
        "vision_config": {"codebook_size": 64, "base_channels": 32, "num_res_blocks": 1},
        "audio_config": {"codebook_size": 32, "codebook_dim": 64},
    },
    "aria": {"projector_patch_to_query_dict": {"16": 4}},
    "llama4": {
        "vision_config": {
            "intermediate_size": 256,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
        },
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_MROPE, "mrope_section": [3, 3, 2]}}},
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 250,
        "text_config": {"rope_parameters": _MROPE},
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 250},
    "step3p7": {"text_config": {"sliding_window": 16}},
    **{
        family: {
            "vision_feature_layer": -1,
            "image_seq_length": 16,
            "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
        }
        for family in ("llava_next", "llava_next_video", "llava_onevision")
    },
    "chameleon": {"vocabulary_map": {"<image>": 299}},
    "mllama": {
        "text_config": {"num_hidden_layers": 2, "cross_attention_layers": [1]},
        "vision_config": {"vision_output_dim": 128},
    },
}
"""Changes to the tiny configuration of each family. Nested configurations are merged."""

_TILES = {"pixel_values": (1, 2, 3, 16, 16)}
_SIZES = [[16, 16], [16, 16]]

IMAGES: dict[str, dict[str, Any]] = {
    "llava": {"image_sizes": None},
    **{
        family: {"pixel_values": (2, 3, 3, 16, 16), "image_sizes": _SIZES}
        for family in ("llava_next", "llava_next_video", "llava_onevision")
    },
    "lfm2_vl": {
        "pixel_values": (2, 16, 48),
        "spatial_shapes": [[4, 4]] * 2,
        "pixel_attention_mask": [[1] * 16] * 2,
    },
    "video_llama_3": {"image_merge_sizes": [2, 2]},
    "paddleocr_vl": {"pixel_values": (156, 3, 4, 4)},
    "kimi_k25": {"pixel_values": (156, 3, 4, 4)},
    "muse_glimmer": {"pixel_values": (156, 96)},
    "muse_spark": {"pixel_values": (156, 96)},
    "deepseek_vl_hybrid": {"high_res_pixel_values": (2, 3, 16, 16)},
    "gemma4": {
        "pixel_values": (2, 36, 48),
        "image_position_ids": [[[x, y] for y in range(6) for x in range(6)]] * 2,
    },
    "granite_docling": {**_TILES, "pixel_attention_mask": [[True, True]]},
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), _TILES),
}
"""Image inputs of families whose signature does not show them.

A tuple is the shape of noise, a list holds the numbers themselves, and None leaves an input out.
"""

ASIDE: dict[str, dict[str, Any]] = {
    "mllama": {
        "pixel_values": (1, 2, 4, 3, 16, 16),
        "aspect_ratio_ids": [[1, 1]],
        "aspect_ratio_mask": [[[1, 0, 0, 0]] * 2],
        "cross_attention_mask": [[[[1, 0, 0, 0]] * 2] * WORDS],
    },
    "idefics": {
        "pixel_values": (1, 2, 3, 16, 16),
        "image_attention_mask": [[[1, 1]] * WORDS],
    },
    "git": {"pixel_values": (1, 3, 16, 16)},
    "blip": {"pixel_values": (1, 3, 16, 16)},
    "kosmos-2": {
        "pixel_values": (1, 3, 16, 16),
        "image_embeds_position_mask": [[1] * 8 + [0] * (WORDS - 8)],
    },
}
"""Image inputs of families whose images are separate from the prompt's tokens."""
