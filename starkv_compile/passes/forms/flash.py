"""flash_attn_func(q, k, v, softmax_scale=..., causal=True), queries and keys [B, S, H, D]

Graphs contain the registered op below that function. Packages and kernels of the hub give it
different names (`flash_attn::_flash_attn_forward`, `_vllm_flash_attn3_1a2b::fwd`), but its schema
identifies it: q, k, v, a scale, causal or is_causal. Everything else that it can do must be off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .. import fx
from ..sites import Attention
from .operands import SDPA_WAY_OUT, read_sides, scale_of

SIDES = (["q", "k", "v"], ["query", "key", "value"])
READ = {"q", "k", "v", "query", "key", "value", "softmax_scale", "scale", "causal", "is_causal"}
NO_MATTER = {  # where results go, how work is shared out, whether more is returned
    "out",
    "out_",
    "deterministic",
    "return_softmax",
    "return_softmax_lse",
    "return_debug_mask",
    "num_splits",
    "pack_gqa",
    "sm_margin",
    "scheduler_metadata",
    "max_seqlen_q",
    "max_seqlen_k",
    "max_q",
    "max_k",
    "is_rotary_interleaved",
    "rotary_interleaved",
    "gen",
    "gen_",
}
OFF: tuple[Any, ...] = (None, 0, -1)  # and so 0.0 and False
NO_WINDOW: tuple[Any, ...] = (None, -1)  # 0 is one that ends at the query's own place
UNPADDED = (
    "FlashAttention of padded or packed prompts (sequences laid end to end) is not supported; pass "
    f"one prompt at a time, or {SDPA_WAY_OUT}"
)


def read(node: Node) -> Attention | None:
    """`node` as an attention if it calls FlashAttention on [B, S, H, D]."""
    if not _is_flash(node) or _switched_on(node):
        return None
    args = fx.bind_schema(node)
    query, key, value = (args[name] for name in fx.argument_names(node)[:3])
    scale = args.get("softmax_scale", args.get("scale"))
    found = read_sides(node, query, key, value, scale, grouped=True, tokens=1)
    if found is None:
        return None
    return Attention(
        node=node,
        form="flash",
        query=found.query.computed(),
        key=found.key,
        value=found.value,
        mask=None,
        causal=bool(args.get("causal", args.get("is_causal"))),
        aligned_last=True,
        scale=scale_of(scale, query, found.factor),
        log_sum_exp=_log_sum_exp(node, query),
    )


def why_not(node: Node) -> str | None:
    """Names what is switched on, or says that the layout does not fit."""
    if not _is_flash(node):
        names = str(node.target)
        if node.op == "call_function" and ("flash_attn" in names or "flash_attention" in names):
            return f"the fused kernel {names} is not supported; {SDPA_WAY_OUT}"
        return None
    switched_on = _switched_on(node)
    if any(name.startswith(("cu_seqlens", "cum_seq", "seqused")) for name in switched_on):
        return UNPADDED
    if switched_on:
        return (
            f"FlashAttention with {', '.join(switched_on)} ({node.target}) is not supported, "
            f"because scores do not account for it; {SDPA_WAY_OUT}"
        )
    return (
        f"FlashAttention ({node.target}) reads queries, keys or values that are not [B, S, H, D], "
        f"or that come from another graph because of a graph break; {SDPA_WAY_OUT}"
    )


def _is_flash(node: Node) -> bool:
    """Whether `node` calls a registered op of a FlashAttention package on q, k and v."""
    name = str(node.target)
    flash = any(part in name for part in ("flash_attn", "_flash_attention_forward", "flash_fwd"))
    return flash and fx.argument_names(node)[:3] in SIDES


def _switched_on(node: Node) -> list[str]:
    """Arguments that ask for more than this form reads: windows, caps, biases, sinks, lengths."""
    args = fx.bind_schema(node)
    more = set(args) - READ - NO_MATTER
    if args.get("causal", args.get("is_causal")):  # says already that nothing right of it counts
        more -= {n for n in ("window_size_right", "window_right") if args.get(n) == 0}
    return sorted(name for name in more if not _is_off(name, args[name]))


def _is_off(name: str, value: Any) -> bool:
    off = NO_WINDOW if name.startswith("window") else OFF
    return not isinstance(value, (Node, str, list, tuple)) and value in off


def _log_sum_exp(node: Node, query: Node) -> int | None:
    """Its second result, if it is [B, H, S], of queries [B, S, H, D]."""
    results: Any = fx.value(node)
    several = isinstance(results, (tuple, list)) and len(results) > 1
    if not several or not isinstance(results[1], torch.Tensor):
        return None
    batch, queries, heads, _ = fx.shape(query)
    return 1 if bool(tuple(results[1].shape) == (batch, heads, queries)) else None
