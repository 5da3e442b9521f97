"""Tiny random models of real architectures, and inputs for them. For tests and examples.

`starkv_compile.testing.hf_suite` runs the test suite of transformers through this package.
transformers imports it if an environment variable names it.
"""

from __future__ import annotations

from .greedy import generate
from .inputs import TinyPrompt, tiny_inputs
from .memory import peak_bytes
from .models import (
    FAMILIES,
    IMAGE_TOKEN,
    LAYERS,
    PAD,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    VOCABULARY,
    tiny_model,
)

__all__ = [
    "FAMILIES",
    "IMAGE_TOKEN",
    "LAYERS",
    "PAD",
    "VIDEO_TOKEN",
    "VISION_END",
    "VISION_START",
    "VOCABULARY",
    "TinyPrompt",
    "generate",
    "peak_bytes",
    "tiny_inputs",
    "tiny_model",
]
