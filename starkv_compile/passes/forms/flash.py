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
from .operands import SDPA_WAY_OUT, source_of

READ = {"q", "k", "v", "softmax_scale", "causal", "is_causal"}
NO_MATTER = {  # where results go, how work is shared out, whether more is returned
    "out",
    "out_",
    "deterministic",
    "return_softmax",
    "return_softmax_lse",
    "num_splits",
    "pack_gqa",
    "sm_margin",
    "scheduler_metadata",
    "max_seqlen_q",
    "max_seqlen_k",
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
    """`node` as an attention if it calls FlashAttention on keys that are cached [B, G, L, D]."""
    if not _is_flash(node) or _switched_on(node):
        return None
    args = fx.bind_schema(node)
    query, key, value = (_heads_first(args[name]) for name in "qkv")
    if query is None or key is None or value is None:
        return None
    scale = args.get("softmax_scale")
    if scale is None and fx.shape(query):
        scale = fx.shape(query)[-1] ** -0.5
    query = list(fx.through(query, fx.see_through_padding))[-1]
    key, value = source_of(key), source_of(value)
    if not fx.agree(("BHSD", query), ("BGLD", key), ("BGLE", value)):
        return None
    return Attention(
        node=node,
        form="flash",
        query=query,
        key=key,
        value=value,
        mask=None,
        causal=bool(args.get("causal", args.get("is_causal"))),
        aligned_last=True,
        scale=scale,
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
    if any(name.startswith(("cu_seqlens", "seqused")) for name in switched_on):
        return UNPADDED
    if switched_on:
        return (
            f"FlashAttention with {', '.join(switched_on)} ({node.target}) is not supported, "
            f"because scores do not account for it; {SDPA_WAY_OUT}"
        )
    return (
        f"FlashAttention ({node.target}) reads queries or keys that are not a transposed "
        "[B, H, S, D], or that come from another graph because of a graph break; "
        f"{SDPA_WAY_OUT}"
    )


def _is_flash(node: Node) -> bool:
    """Whether `node` calls a registered op of a FlashAttention package on q, k and v."""
    return "flash_attn" in str(node.target) and fx.argument_names(node)[:3] == ["q", "k", "v"]


def _switched_on(node: Node) -> list[str]:
    """Arguments that ask for more than this form reads: windows, caps, biases, sinks, lengths."""
    args = fx.bind_schema(node)
    more = set(args) - READ - NO_MATTER
    if args.get("causal", args.get("is_causal")) and args.get("window_size_right") == 0:
        more.remove("window_size_right")  # what causal says already
    return sorted(name for name in more if not _is_off(name, args[name]))


def _is_off(name: str, value: Any) -> bool:
    off = NO_WINDOW if name.startswith("window_size") else OFF
    return not isinstance(value, (Node, str, list, tuple)) and value in off


def _heads_first(node: Any) -> Node | None:
    """Returns [B, H, S, D] if `node` is that tensor with heads and tokens exchanged."""
    for source in fx.through(node, fx.see_through_copies, fx.see_through_padding):
        if fx.order_of_dims(source) == [0, 2, 1, 3]:
            return fx.operand(source)
    return None


def _log_sum_exp(node: Node, query: Node) -> int | None:
    """Its second result, if it is [B, H, S]."""
    results: Any = fx.value(node)
    several = isinstance(results, (tuple, list)) and len(results) > 1
    if not several or not isinstance(results[1], torch.Tensor):
        return None
    return 1 if bool(tuple(results[1].shape) == fx.shape(query)[:3]) else None
