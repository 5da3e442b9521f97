"""Find the attention of prompts. Analysis only: nothing is changed.

Two forms, each a function that reads one node:

    sdpa    scaled_dot_product_attention(q, k, v, mask, is_causal=..., enable_gqa=...)
    eager   matmul(dropout(softmax(matmul(q, k^T) * scale + mask)), v)
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from . import fx
from .base import Context, GraphPass
from .sites import Attention, Site


class FindAttention(GraphPass):
    """Fills `context.sites`; attention of a single query (decoding) is counted and left."""

    def run(self, context: Context) -> None:
        for node in context.graph.nodes:
            found = read_sdpa(node) or read_eager(node)
            if found is None:
                continue
            attention, causal = found
            if not fx.shape(attention.query):
                context.refuse(
                    "no example values are recorded: capture the graph by torch.export or "
                    "torch.compile, or run torch.fx.passes.fake_tensor_prop.FakeTensorProp on it",
                    node,
                )
                continue
            if len(fx.shape(attention.query)) != 4:
                continue
            queries, keys = fx.shape(attention.query)[2], fx.shape(attention.key)[2]
            if isinstance(queries, int) and queries == 1:
                context.decode_sites += 1
                continue
            if not causal and attention.mask is None:
                context.encoder_sites += 1
                continue
            site = Site(len(context.sites) + len(context.refusals), attention)
            context.sites.append(site)
            self.matched += 1
            if fx.shape(attention.query)[1] % fx.shape(attention.key)[1]:
                context.refuse("query heads are no multiple of KV heads", node, site)
            elif causal and attention.mask is None and not bool(queries == keys):
                context.refuse(
                    "is_causal with more keys than queries aligns the mask to the first key, so "
                    "the last queries do not see the last keys",
                    node,
                    site,
                )


def read_sdpa(node: Node) -> tuple[Attention, bool] | None:
    """(attention, causal) if `node` is a call of scaled_dot_product_attention."""
    if not fx.is_op(node, fx.SDPA):
        return None
    args = fx.bind(
        node, "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"
    )
    scale = args.get("scale")
    if scale is None and fx.shape(args["query"]):
        scale = fx.shape(args["query"])[-1] ** -0.5
    attention = Attention(
        node=node,
        form="sdpa",
        query=args["query"],
        key=source_of(args["key"]),
        value=source_of(args["value"]),
        mask=args.get("attn_mask"),
        scale=scale,
    )
    return attention, bool(args.get("is_causal"))


def read_eager(node: Node) -> tuple[Attention, bool] | None:
    """The same for attention spelled out. Causality is in the mask, so `causal` is False."""
    if not fx.is_op(node, fx.MATMUL):
        return None
    weights, value = node.args[0], node.args[1]
    softmax = _softmax_behind(weights)
    if softmax is None:
        return None
    logits, mask = _split_mask(softmax.args[0])
    product, scale = _split_scale(logits)
    if not fx.is_op(product, fx.MATMUL):
        return None
    query, transposed = product.args
    if not fx.is_op(transposed, fx.TRANSPOSE):
        return None
    key = transposed.args[0]
    attention = Attention(
        node=node, form="eager", query=query, key=source_of(key), value=source_of(value),
        mask=mask, scale=scale,
    )  # fmt: skip
    return attention, False


def source_of(node: Any) -> Node:
    """Keys or values before their heads were repeated."""
    return list(fx.through(node, fx.see_through_copies, fx.see_through_repeat_kv))[-1]


def _see_through_weights(node: Node) -> Node | None:
    if fx.is_op(node, fx.DROPOUT + fx.CAST):
        return node.args[0]  # type: ignore[return-value]
    return None


def _softmax_behind(weights: Any) -> Node | None:
    """The softmax behind attention weights."""
    chain = list(fx.through(weights, _see_through_weights))
    return chain[-1] if chain and fx.is_op(chain[-1], fx.SOFTMAX) else None


def _split_mask(logits: Any) -> tuple[Any, Node | None]:
    """(logits, mask) of `logits + mask`, else (logits, None)."""
    adds = ("add", "__add__", fx.aten.add.Tensor)
    if isinstance(logits, Node) and (fx.is_op(logits, adds) or _is_operator(logits, "add")):
        left, right = logits.args[:2]
        if isinstance(right, Node):
            return left, right
    return logits, None


def _split_scale(logits: Any) -> tuple[Any, float]:
    """(product, scale) of `product * scale` or `product / divisor`, else (product, 1)."""
    if not isinstance(logits, Node) or len(logits.args) < 2:
        return logits, 1.0
    product, factor = logits.args[:2]
    if isinstance(factor, (int, float)):
        if _is_operator(logits, "mul") or logits.target is fx.aten.mul.Tensor:
            return product, float(factor)
        if _is_operator(logits, "truediv") or logits.target is fx.aten.div.Tensor:
            return product, 1.0 / factor
    return logits, 1.0


def _is_operator(node: Node, name: str) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == name
