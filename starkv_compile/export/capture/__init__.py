"""Captures a model as graphs that are ready to be written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import lazy_names

if TYPE_CHECKING:
    from .capture import cut_graph
    from .decoder import Decode, Decoder, Prefill, describe, traceable
    from .ports import Shapes, decode_ports, prefill_ports

# `starkv --help` does not need torch.
__getattr__ = lazy_names(
    __name__,
    {
        "Decode": "decoder",
        "Decoder": "decoder",
        "Prefill": "decoder",
        "Shapes": "ports",
        "cut_graph": "capture",
        "decode_ports": "ports",
        "describe": "decoder",
        "prefill_ports": "ports",
        "traceable": "decoder",
    },
)

__all__ = [
    "Decode",
    "Decoder",
    "Prefill",
    "Shapes",
    "cut_graph",
    "decode_ports",
    "describe",
    "prefill_ports",
    "traceable",
]
