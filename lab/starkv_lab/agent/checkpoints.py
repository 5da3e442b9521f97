"""Writes and reads the agent's checkpoint folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starkv_compile import StarKVError

from .vocabulary import END, PAD, TOKEN_ID

SHIPPED = Path(__file__).parent / "checkpoint"
NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "processor_config.json")


def save_agent(weights: Any, folder: Path) -> None:
    """Writes model, tokenizer and processor to `folder`, and creates the folder if needed.

    Args:
        weights: a Qwen3-VL of `architecture.build_config()`, or its state dict. The function does
            not change it.
        folder: the folder for `load_agent`.
    """
    from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

    from .architecture import CHAT_TEMPLATE, build_config, build_image_processor, build_tokenizer
    from .processor import AgentProcessor

    state = weights if isinstance(weights, Mapping) else weights.state_dict()
    model = Qwen3VLForConditionalGeneration(build_config())
    model.load_state_dict(state)
    model.half()  # half the bytes to ship; `load_agent` computes in float32
    # Replies end with END; PAD is never generated and only fills the left of shorter rows.
    model.generation_config = GenerationConfig(
        eos_token_id=TOKEN_ID[END], pad_token_id=TOKEN_ID[PAD], do_sample=False
    )
    model.save_pretrained(folder)
    processor = AgentProcessor(build_image_processor(), build_tokenizer(), CHAT_TEMPLATE)
    processor.save_pretrained(folder)


def agent_folder(path: Path | None = None) -> Path:
    """Returns `path`, or for None the demo agent's folder, after it found all files there.

    Raises:
        StarKVError: the folder holds no checkpoint.
    """
    folder = SHIPPED if path is None else Path(path)
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise StarKVError(
            f"no agent in {folder}: it lacks {', '.join(missing)}; train an agent with "
            "`python -m starkv_lab.training.train --out FOLDER` and give that folder"
        )
    return folder


def weights_digest(folder: Path) -> str:
    """Returns an id of a folder's weights, which tells one model's answers from another's."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]


def load_agent(path: Path | None = None) -> tuple[Any, Any]:
    """Loads the agent from the folder `path`, by default the demo agent.

    Returns:
        Model (float32, eval mode, CPU) and its `AgentProcessor`.

    Raises:
        StarKVError: the folder holds no checkpoint.
    """
    folder = agent_folder(path)
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    from .processor import AgentProcessor

    model = Qwen3VLForConditionalGeneration.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    return model.eval(), AgentProcessor.from_pretrained(folder, local_files_only=True)
