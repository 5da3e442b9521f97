"""Tiny random models of real architectures, and inputs for them. For tests and examples."""

from __future__ import annotations

from .inputs import TinyPrompt, generate, tiny_inputs
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
    "tiny_inputs",
    "tiny_model",
]
