"""Builds a tiny random model of any family from its default configuration, with capped sizes."""

from __future__ import annotations

from typing import Any

import torch

from .recipes import CONFIG, MROPE_SECTION, TEXT_FAMILIES

CAPS = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "hidden_dim"), 64),
    **dict.fromkeys(("out_hidden_size", "output_dim", "projection_dim", "text_hidden_size"), 64),
    **dict.fromkeys(("embed_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_dim"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_head_dim", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "index_topk"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "patch_size", "mm_tokens_per_image"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("image_size", "sliding_window"), 16),
    "num_nextn_predict_layers": 0,
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size"), 300),
    "max_position_embeddings": 4096,
}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "depth")
FIRST_WORD, LAST_WORD = 5, 200  # ids of prompts' words, below those of special tokens
LARGEST = 300_000_000  # most parameters of a model that is tried
HIGHEST_TOKEN = CAPS["vocab_size"] - 1


def tiny_config(family: str) -> Any:
    """Makes the family's default configuration tiny and applies its recipe."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    values = shrink(kind().to_dict())
    for name in ("transformers_version", "architectures", "model_type"):
        values.pop(name, None)
    return kind(**_merged(values, CONFIG.get(family, {})))


def tiny_model(family: str) -> Any:
    """Builds a random model of `family`, float32, in eval mode, that never stops generating."""
    import transformers

    kind, config = getattr(transformers, families()[family]), tiny_config(family)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > LARGEST:
        raise ValueError(
            f"{size / 1e6:,.0f} M parameters: CAPS does not know the names of its sizes"
        )
    torch.manual_seed(0)
    model = kind(config).eval()
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None
    return model


def families() -> dict[str, str]:
    """Returns the model class of each image-text-to-text family and of a few text families."""
    from transformers.models.auto import modeling_auto as auto

    images = dict(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    text = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return images | {name: text[name] for name in TEXT_FAMILIES if name in text}


def shrink(values: dict[str, Any]) -> dict[str, Any]:
    """Caps sizes, moves special tokens into the vocabulary, and keeps one layer of each kind.

    A list with one entry for each layer keeps the entries of the layers that stay.
    """
    layers = next((values[n] for n in LAYER_COUNTS if isinstance(values.get(n), int)), 0)
    chosen = _one_of_each(values.get("layer_types") or [], layers)
    special = HIGHEST_TOKEN
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name == "per_layer_config" and isinstance(value, dict):
            by_layer = {int(layer): entry for layer, entry in value.items()}
            value = {new: by_layer[old] for new, old in enumerate(chosen) if old in by_layer}
        elif isinstance(value, dict) and (name.endswith("_config") or "model_type" in value):
            value = shrink(value)
        elif name == "rope_parameters" and value and "mrope_section" in value:
            value = {**value, "mrope_section": MROPE_SECTION}
        elif name in LAYER_COUNTS and isinstance(value, int):
            value = len(chosen) or min(2, value)
        elif isinstance(value, list) and layers > 2 and len(value) == layers:
            value = [value[layer] for layer in chosen]
        elif name.endswith(("_indexes", "_indices")) and value and isinstance(value, list):
            value = [0]
        elif _is_int(value) and _is_special(name, value):
            value, special = special, special - 1
        elif name in CAPS and _is_int(value):
            value = min(value, CAPS[name])
        small[name] = value
    return small


def _one_of_each(kinds: list[Any], layers: int) -> list[int]:
    """Returns the first layer of each kind, or two layers if there is one kind."""
    first = sorted(kinds.index(kind) for kind in dict.fromkeys(kinds))
    return first if len(kinds) == layers and len(first) > 1 else list(range(min(2, layers)))


def _is_special(name: str, value: int) -> bool:
    """Whether a prompt must not use this token. The text's own few tokens stay where they are."""
    if not name.endswith(("_token_id", "_token_index")):
        return False
    return value > LAST_WORD or not name.startswith(("pad_", "bos_", "eos_"))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Applies `changes` to `values`, and merges the configurations inside as well."""
    merged = dict(values)
    for name, change in changes.items():
        old: Any = merged.get(name)
        nested = isinstance(old, dict) and name.endswith("_config")
        merged[name] = _merged(old, change) if nested else change
    return merged
