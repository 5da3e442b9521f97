"""Find the attention of prompts. Analysis only: nothing is changed.

Three forms, each a function that reads one node:

    sdpa    scaled_dot_product_attention(q, k, v, mask, is_causal=..., enable_gqa=...)
    eager   matmul(dropout(softmax(matmul(q, k^T) * scale + mask)), v)
    flex    flex_attention(q, k, v, score_mod, block_mask), where score_mod changes nothing

What looks like attention and is none of them is refused by what it has beside.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from . import fx
from .base import Context, GraphPass
from .sites import Attention, Site

SDPA_WAY_OUT = 'load the model with attn_implementation="sdpa"'


class FindAttention(GraphPass):
    """Fills `context.sites`; attention of a single query (decoding) is counted and left."""

    def run(self, context: Context) -> None:
        for node in context.graph.nodes:
            attention = read_sdpa(node) or read_eager(node) or read_flex(node)
            if attention is None:
                reason = why_not(node)
                if reason is not None and not _is_one(fx.shape(node)[-2:-1]):
                    context.refuse(reason, node)
                continue
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
            if _is_one((queries,)):
                context.decode_sites += 1
                continue
            unmasked = attention.mask is None and not attention.mask_function
            if unmasked and not attention.causal and not _is_cached(attention.key):
                context.encoder_sites += 1
                continue
            site = Site(len(context.sites) + len(context.refusals), attention)
            context.sites.append(site)
            self.matched += 1
            if fx.shape(attention.query)[1] % fx.shape(attention.key)[1]:
                context.refuse("query heads are no multiple of KV heads", node, site)
            elif unmasked and attention.causal and not bool(queries == keys):
                context.refuse(
                    "is_causal with more keys than queries aligns the mask to the first key, so "
                    "the last queries do not see the last keys",
                    node,
                    site,
                )


def _is_one(queries: tuple[Any, ...]) -> bool:
    """Whether a single query asks: decoding."""
    return queries == (1,) and isinstance(queries[0], int)


def _is_cached(key: Node) -> bool:
    """Whether a cache stores these keys: a prompt that sees all of itself, no encoder."""
    return any(fx.is_op(user, fx.CACHE_WRITE) for user in key.users)


def read_sdpa(node: Node) -> Attention | None:
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


def read_eager(node: Node) -> Attention | None:
    """The same for attention spelled out, whose mask says what is hidden."""
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
    return Attention(
        node=node, form="eager", query=query, key=source_of(key), value=source_of(value),
        mask=mask, causal=False, scale=scale,
    )  # fmt: skip


def read_flex(node: Node) -> Attention | None:
    """The same for flex_attention, whose mask is a function of places."""
    if not fx.is_op(node, fx.FLEX):
        return None
    arguments: Any = node.args
    query, key, value, score, block_mask, scale, _, _, inputs = arguments
    if not _changes_nothing(score) or not isinstance(block_mask, tuple) or _has_sink(node):
        return None
    return Attention(
        node=node, form="flex", query=query, key=source_of(key), value=source_of(value),
        mask=None, causal=False, scale=scale, mask_function=(block_mask[-1], *inputs),
    )  # fmt: skip


def _changes_nothing(function: Any) -> bool:
    """Whether a `score_mod(score, batch, head, query, key)` returns the score itself."""
    graph = function.graph.owning_module.get_submodule(function.target).graph
    first = next(iter(graph.find_nodes(op="placeholder")))
    returned = torch.fx.node.map_arg(graph.output_node().args[0], lambda n: n)
    return returned in (first, (first,), [first])


def _has_sink(node: Node) -> bool:
    """Whether flex_attention's second result, the log-sum-exp, is joined with something."""
    queue = [user for user in node.users if user.args[1:] == (1,)]
    while queue:
        user = queue.pop()
        if fx.is_op(user, fx.CAT + fx.LOG_SUM_EXP):
            return True
        if user.target is operator.getitem or fx.is_op(user, fx.CAST + fx.UNSQUEEZE):
            queue += user.users
    return False


def why_not(node: Node) -> str | None:
    """What an attention that no form reads has, which scores would not account for."""
    if fx.is_op(node, fx.FLEX):
        return f"flex_attention with a score_mod or a sink is not read; {SDPA_WAY_OUT}"
    target = str(node.target)
    if node.op == "call_function" and ("flash_attn" in target or "flash_attention" in target):
        return f"a fused kernel ({target}) is not read; {SDPA_WAY_OUT}"
    if not fx.is_op(node, fx.MATMUL):
        return None
    softmax = _softmax_behind(node.args[0])
    if softmax is None:
        return None
    for source in fx.through(softmax.args[0], _first_operand):
        if fx.is_op(source, fx.CAT):
            return "its softmax has a sink beside the keys, which scores do not account for"
        if fx.is_op(source, fx.TANH):
            return "its logits are soft-capped, which scores do not account for"
    return None


def _first_operand(node: Node) -> Node | None:
    """Of sums, products and the like."""
    arithmetic = ("add", "sub", "mul", "truediv", "__add__")
    if node.op.startswith("call_") and getattr(node.target, "__name__", node.target) in arithmetic:
        return node.args[0] if isinstance(node.args[0], Node) else None
    return None


def source_of(node: Any) -> Node:
    """Keys or values before their heads were repeated."""
    return list(fx.through(node, fx.see_through_copies, fx.see_through_repeat_kv))[-1]


def _see_through_weights(node: Node) -> Node | None:
    if fx.is_op(node, fx.DROPOUT + fx.CAST) or node.target is operator.getitem:
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
