"""The ATen kernels that scaled_dot_product_attention runs.

`make_fx` and decompositions put these calls into graphs. Device, dtype and mask decide which one.
"""

from __future__ import annotations

from torch.fx import Node

from .. import fx
from ..sites import Attention
from .operands import source_of

FLASH = (
    fx.aten._scaled_dot_product_flash_attention_for_cpu.default,
    fx.aten._scaled_dot_product_flash_attention.default,
)
"""The kernels that always return the log-sum-exp [B, H, S]."""
KERNELS = (
    *FLASH,
    fx.aten._scaled_dot_product_efficient_attention.default,
    fx.aten._scaled_dot_product_cudnn_attention.default,
    fx.aten._scaled_dot_product_fused_attention_overrideable.default,
)


def read(node: Node) -> Attention | None:
    """`node` as an attention if it calls one of `KERNELS`."""
    if not fx.is_op(node, KERNELS):
        return None
    args = fx.bind_schema(node)
    scale = args.get("scale")
    if scale is None and fx.shape(args["query"]):
        scale = fx.shape(args["query"])[-1] ** -0.5
    query = list(fx.through(args["query"], fx.see_through_padding))[-1]
    return Attention(
        node=node,
        form="kernel",
        query=query,
        key=source_of(args["key"]),
        value=source_of(args["value"]),
        mask=args.get("attn_mask", args.get("attn_bias")),
        causal=bool(args.get("is_causal")),
        scale=scale,
        log_sum_exp=1 if node.target in FLASH else None,
    )


def why_not(node: Node) -> str | None:
    """A kernel of another kind."""
    if node.op == "call_function" and "_scaled_dot_product_" in str(node.target):
        return f"the kernel {node.target} is not supported; export without decomposing attention"
    return None
