"""Loads models from a checkpoint's folder. Every error is one sentence. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import StarKVError, UnsupportedModel


def check_folder(checkpoint: Path) -> None:
    """Raises `StarKVError` if there is no checkpoint in the folder."""
    if not (checkpoint / "config.json").is_file():
        raise StarKVError(
            f"{checkpoint}: there is no checkpoint (config.json is missing); give the folder "
            "that `save_pretrained` wrote, or that a download of the model made: names of a hub "
            "are not looked up"
        )


def read_config(checkpoint: Path) -> Any:
    """Returns the configuration object of transformers.

    Raises:
        UnsupportedModel: this transformers cannot read config.json.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().split("\n")[0]
        raise UnsupportedModel(
            f"{checkpoint}: this transformers cannot read config.json ({why}); install a version "
            "that knows the model, or give another checkpoint"
        ) from error


def load_pretrained(checkpoint: Path, config: Any, dtype: torch.dtype | str) -> Any:
    """Returns the model in eval mode, with attention by `scaled_dot_product_attention`.

    Args:
        checkpoint: folder that `save_pretrained` wrote.
        config: what `read_config` returned.
        dtype: type of the weights. "auto": the type in the files.

    Raises:
        UnsupportedModel: it is not a language or vision-language model, or weights are missing or
            have other shapes.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    families = {
        **auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        **auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    name = families.get(config.model_type)
    if name is None:
        raise UnsupportedModel(
            f"{checkpoint}: model type {config.model_type!r}; expected a language or "
            "vision-language model that this transformers knows"
        )
    try:
        model, found = getattr(transformers, name).from_pretrained(
            checkpoint,
            local_files_only=True,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except Exception as error:  # of the library, safetensors and torch, by what is wrong
        why = str(error).strip().split("\n")[0]
        raise UnsupportedModel(
            f"{checkpoint}: its weights cannot be loaded into a {name} ({why}); give a "
            "folder with all files that `save_pretrained` wrote"
        ) from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise UnsupportedModel(
            f"{checkpoint}: {len(missing)} weights are not in its files ({missing[0]}, "
            "...), so they would be random; give a folder with all files that `save_pretrained` "
            "wrote"
        )
    return model.eval()
