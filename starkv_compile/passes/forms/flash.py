"""The kernels of the FlashAttention packages."""

from __future__ import annotations

from torch.fx import Node

from ..sites import Attention
from .operands import SDPA_WAY_OUT


def read(node: Node) -> Attention | None:
    """None is read yet."""
    return None


def why_not(node: Node) -> str | None:
    """That it is one."""
    target = str(node.target)
    if node.op == "call_function" and ("flash_attn" in target or "flash_attention" in target):
        return f"a fused kernel ({target}) is not read; {SDPA_WAY_OUT}"
    return None
