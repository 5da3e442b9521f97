"""The demo agent is a Qwen3-VL of 2.5 M parameters. This package also has its world.

    model, processor = load_agent()

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from .checkpoints import load_agent, save_agent

__all__ = ["load_agent", "save_agent"]
