"""The embedded GUI agent: a Qwen3-VL of 2 M parameters, and the world it was trained in.

    model, processor = load_agent()

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from .checkpoints import load_agent, save_agent

__all__ = ["load_agent", "save_agent"]
