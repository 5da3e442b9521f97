"""scaled_dot_product_attention(q, k, v, mask, is_causal=..., enable_gqa=...)"""

from __future__ import annotations

from torch.fx import Node

from .. import fx, ops
from ..sites import Attention
from .operands import as_given, read_sides, scale_of


def read(node: Node) -> Attention | None:
    """`node` as an attention if it calls scaled_dot_product_attention."""
    if not fx.is_op(node, ops.SDPA):
        return None
    args = fx.bind(
        node, "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"
    )
    sides, scale = (args["query"], args["key"], args["value"]), args.get("scale")
    found = read_sides(node, *sides, scale, grouped=bool(args.get("enable_gqa")))
    if found is None or (len(fx.shape(sides[0])) != 4 and len(fx.shape(args.get("attn_mask"))) > 2):
        found = as_given(*sides)
    return Attention(
        node=node,
        form="sdpa",
        query=found.query.computed(),
        key=found.key,
        value=found.value,
        mask=args.get("attn_mask"),
        causal=bool(args.get("is_causal")),
        scale=scale_of(scale, sides[0], found.factor),
    )


def why_not(node: Node) -> str | None:
    """Returns None, because every call is read."""
    return None
