"""flash_attn_func(q, k, v, softmax_scale=..., causal=True), queries and keys [B, S, H, D]

As graphs have it: the registered op below that function. Packages and kernels of the hub name it
differently (`flash_attn::_flash_attn_forward`, `_vllm_flash_attn3_1a2b::fwd`), but its schema
tells: q, k, v, a scale, causal or is_causal, and what else it may do, which must be switched off.
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
    "FlashAttention of padded or packed prompts (sequences laid end to end) is not read: pass one "
    f"prompt at a time, or {SDPA_WAY_OUT}"
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
    """What is switched on, or that the layout is another."""
    if not _is_flash(node):
        names = str(node.target)
        if node.op == "call_function" and ("flash_attn" in names or "flash_attention" in names):
            return f"a fused kernel ({names}) is not read; {SDPA_WAY_OUT}"
        return None
    switched_on = _switched_on(node)
    if any(name.startswith(("cu_seqlens", "seqused")) for name in switched_on):
        return UNPADDED
    if switched_on:
        return (
            f"FlashAttention with {', '.join(switched_on)} ({node.target}), which scores do not "
            f"account for; {SDPA_WAY_OUT}"
        )
    return (
        f"FlashAttention ({node.target}) of queries or keys that are no [B, H, S, D] transposed, "
        f"or come from another graph because this one broke in between; {SDPA_WAY_OUT}"
    )


def _is_flash(node: Node) -> bool:
    """Whether `node` calls a registered op of a FlashAttention package on q, k and v."""
    return "flash_attn" in str(node.target) and fx.argument_names(node)[:3] == ["q", "k", "v"]


def _switched_on(node: Node) -> list[str]:
    """Arguments that ask for more than this form has: windows, caps, biases, sinks, lengths."""
    args = fx.bind_schema(node)
    more = set(args) - READ - NO_MATTER
    if args.get("causal", args.get("is_causal")) and args.get("window_size_right") == 0:
        more.remove("window_size_right")  # what causal says already
    return sorted(name for name in more if not _is_off(name, args[name]))


def _is_off(name: str, value: Any) -> bool:
    off = NO_WINDOW if name.startswith("window_size") else OFF
    return not isinstance(value, (Node, str, list, tuple)) and value in off


def _heads_first(node: Any) -> Node | None:
    """[B, H, S, D] where `node` is that with heads and tokens exchanged."""
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
