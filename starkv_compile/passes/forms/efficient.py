"""Memory-efficient attention on [B, S, H, D]: xformers' op, and ATen's below it

`xformers::efficient_attention_forward_cutlass` and `aten::_efficient_attention_forward` have one
schema but for names: query, key, value, a bias, a type of causal mask. Everything else must be off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .. import fx
from ..sites import Attention, Computed
from .operands import SDPA_WAY_OUT, read_sides, scale_of

SIDES = ["query", "key", "value"]
MASK_TYPE = "custom_mask_type"
CAUSAL, CAUSAL_TO_LAST = 1, 2
"""Mask types: the first query sees the first key, or the last query sees the last key."""
BIAS = ("attn_bias", "bias")
READ = {*SIDES, *BIAS, MASK_TYPE, "scale"}
NO_MATTER = {
    "compute_logsumexp",
    "compute_log_sumexp",
    "max_seqlen_q",
    "max_seqlen_q_",
    "max_seqlen_k",
}


def read(node: Node) -> Attention | None:
    """`node` as an attention if it calls memory-efficient attention on one prompt in each row."""
    if not _is_efficient(node) or _switched_on(node):
        return None
    args = fx.bind_schema(node)
    scale, kind = args.get("scale"), args.get(MASK_TYPE)
    query, key, value = (args[name] for name in SIDES)
    found = read_sides(node, query, key, value, scale, tokens=1)
    if found is None or kind not in (0, CAUSAL, CAUSAL_TO_LAST):
        return None
    bias = next((args[name] for name in BIAS if args.get(name) is not None), None)
    return Attention(
        node=node,
        form="efficient",
        query=found.query.computed(),
        key=found.key,
        value=found.value,
        mask=bias if not kind or bias is None else Computed(_causal(kind), (bias,)),
        causal=kind != 0,
        aligned_last=kind == CAUSAL_TO_LAST,
        scale=scale_of(scale, query, found.factor),
    )


def why_not(node: Node) -> str | None:
    """Names what is switched on, or says that the layout does not fit."""
    if "efficient_attention" not in str(node.target) or node.op != "call_function":
        return None
    if "backward" in str(node.target) or "_scaled_dot_product" in str(node.target):
        return None
    switched_on = _switched_on(node) if _is_efficient(node) else []
    if switched_on:
        return (
            f"memory-efficient attention with {', '.join(switched_on)} ({node.target}) is not "
            f"supported, because scores do not account for it; {SDPA_WAY_OUT}"
        )
    return (
        f"{node.target} is not a memory-efficient attention that starkv knows (query, key, value "
        f"[B, S, H, D], a bias, {MASK_TYPE} 0, 1 or 2); {SDPA_WAY_OUT}"
    )


def _is_efficient(node: Node) -> bool:
    names = fx.argument_names(node)
    return "efficient_attention" in str(node.target) and names[:3] == SIDES and MASK_TYPE in names


def _switched_on(node: Node) -> list[str]:
    """Arguments that ask for more than this form reads: packed prompts, windows, dropout."""
    args = fx.bind_schema(node)
    more = set(args) - READ - NO_MATTER
    return sorted(
        name for name in more if isinstance(args[name], Node) or args[name] not in (None, 0)
    )


def _causal(kind: int) -> Any:
    """A bias [B, H, S, L] and the causal mask of that type, in one."""

    def make(bias: Any) -> Any:
        moved = bias.shape[-1] - bias.shape[-2] if kind == CAUSAL_TO_LAST else 0
        seen = torch.ones_like(bias, dtype=torch.bool).tril(moved)
        return bias.masked_fill(torch.logical_not(seen), float("-inf"))

    return make
