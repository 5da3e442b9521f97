"""The ATen kernels that scaled_dot_product_attention runs.

`make_fx` and decompositions put these calls into graphs. Device, dtype and mask decide which one.
"""

from __future__ import annotations

from torch.fx import Node

from .. import fx
from ..sites import Attention
from .operands import as_given, read_sides, scale_of

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
    sides = args["query"], args["key"], args["value"]
    # The flash kernels read fewer heads of keys by themselves, on the CPU and on GPUs.
    found = read_sides(node, *sides, args.get("scale"), grouped=True) or as_given(*sides)
    return Attention(
        node=node,
        form="kernel",
        query=found.query.computed(),
        key=found.key,
        value=found.value,
        mask=args.get("attn_mask", args.get("attn_bias")),
        causal=bool(args.get("is_causal")),
        scale=scale_of(args.get("scale"), sides[0], found.factor),
        log_sum_exp=1 if node.target in FLASH else None,
    )


def why_not(node: Node) -> str | None:
    """A kernel of another kind."""
    if node.op == "call_function" and "_scaled_dot_product_" in str(node.target):
        return f"the kernel {node.target} is not supported; export without decomposing attention"
    return None
