"""scaled_dot_product_attention(q, k, v, mask, is_causal=..., enable_gqa=...)"""

from __future__ import annotations

from torch.fx import Node

from .. import fx
from ..sites import Attention
from .operands import source_of


def read(node: Node) -> Attention | None:
    """`node` as an attention if it calls scaled_dot_product_attention."""
    if not fx.is_op(node, fx.SDPA):
        return None
    args = fx.bind(
        node, "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"
    )
    scale = args.get("scale")
    if scale is None and fx.shape(args["query"]):
        scale = fx.shape(args["query"])[-1] ** -0.5
    return Attention(
        node=node,
        form="sdpa",
        query=args["query"],
        key=source_of(args["key"]),
        value=source_of(args["value"]),
        mask=args.get("attn_mask"),
        causal=bool(args.get("is_causal")),
        scale=scale,
    )


def why_not(node: Node) -> str | None:
    """Returns None, because every call is read."""
    return None
