"""Lets the attention of a decoded token read codes, in the place of what the cache made of them."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from ..kernels.ops import STARKV
from . import forms, fx, ops
from .base import Context, GraphPass
from .find_cache_writes import TOKENS
from .forms.logits import PRODUCT
from .functional import is_intact, written_by
from .masks import visible
from .sites import Arranged, Attention

LAYOUTS = {"sdpa": (0, 1, 2, 3), "spelled out": (0, 1, 2, 3), "flash": (0, 2, 1, 3)}
"""Forms whose result is understood, each with the order that it gives to [B, H, S, D]."""


class ReadCodes(GraphPass):
    """Before: `k = cat(starkv.dequantize(codes, ...), newer); y = sdpa(q, k, v)`, of one query.

    After: `y = starkv.quantized_attention(q, codes, ..., newer, ...)`. Other attention, such as a
    prompt's, still reads what `dequantize` makes, one layer at a time.
    """

    def run(self, context: Context) -> None:
        if not any(fx.is_op(node, ops.DEQUANTIZE) for node in context.graph.nodes):
            return
        for node in list(context.functional.graph.nodes):
            attention = forms.read(node)
            if attention is not None and _is_understood(attention):
                self._replace(context, attention)

    def _replace(self, context: Context, attention: Attention) -> None:
        key, value = (_parts_of(side) for side in (attention.key, attention.value))
        result = _result(context.functional.given(attention.node))
        if key is None or value is None or result is None:
            return
        parts = [*key, *value]
        if not all(is_intact(part, attention.node) for part in parts):
            return
        if not _agree(attention, parts):
            return
        query, order = fx.shape(attention.query), LAYOUTS[attention.form]
        shape = [(*query[:3], fx.shape(value[-1])[-1])[dim] for dim in order]
        if not all(map(fx.same, fx.shape(result), shape)):
            return
        given = map(context.functional.given, (*key[:-1], *value[:-1], key[-1], value[-1]))
        with context.graph.inserting_before(context.functional.given(attention.node)):
            asked = context.compute(attention.query)
            mask = visible(context.proxy(context.compute(attention.mask)), attention)
            arguments = [*map(context.proxy, [asked, *given]), mask]
            out = STARKV.quantized_attention(*arguments, context.proxy(attention.scale))
            out = out if order == (0, 1, 2, 3) else out.transpose(1, 2)
            if fx.value(result).dtype != fx.value(asked).dtype:
                out = out.to(fx.value(result).dtype)
        result.replace_all_uses_with(out.node)
        for side in (attention.key, attention.value):
            _read_sizes_of(out, context.functional.given(side.node), shape)
        _erase(context, result)
        self.matched += 1


def _is_understood(attention: Attention) -> bool:
    query = fx.shape(attention.query)
    if attention.form not in LAYOUTS or attention.mask_function or len(query) != 4:
        return False
    if not fx.same(query[TOKENS], 1) or fx.has_gradient(attention.node):
        return False
    if attention.causal and not attention.aligned_last:  # aligned with the oldest key
        return False
    # A permuted result would look like one that is not if two of its dimensions have one size.
    rows, heads, _, _ = query
    wide = fx.shape(attention.value.node)[-1]
    alike = heads != 1 and (fx.same(rows, heads) or fx.same(heads, wide))
    return not (attention.form == "spelled out" and alike) and not _drops(attention)


def _agree(attention: Attention, parts: list[Node]) -> bool:
    """Whether nothing is broadcast that the op does not broadcast."""
    batch, heads = fx.shape(attention.query)[:2]
    groups = fx.shape(parts[0])[1]
    length = fx.shape(attention.key.node)[TOKENS]
    last = fx.shape(attention.mask)[-1:] or (length,)
    return (
        all(fx.same(fx.shape(part)[0], batch) for part in parts)
        and all(fx.same(fx.shape(part)[1], groups) for part in parts)
        and fx.same(heads % groups, 0)
        and fx.same(last[0], length)
    )


def _drops(attention: Attention) -> bool:
    """Whether some of the weights are dropped at random."""
    if attention.form == "sdpa":
        names = ("query", "key", "value", "attn_mask", "dropout_p")
        return bool(fx.bind(attention.node, *names).get("dropout_p"))
    queue, seen = fx.producers(attention.node), set()
    while queue:
        node = queue.pop()
        if node in seen or node < min(attention.key.node, attention.value.node):
            continue
        seen.add(node)
        args = fx.bind(node, "input", "p", "training")
        if fx.is_op(node, ops.DROPOUT) and args.get("p", 0.5) and args.get("training", True):
            return True
        queue += fx.producers(node)
    return False


def _parts_of(side: Arranged) -> list[Node] | None:
    """Codes, ranges, centre and newer tokens of keys or values that were joined of these."""
    node: Any = side.node
    if not side.is_plain or not fx.is_op(node, ops.CAT):
        return None
    args = fx.bind(node, "tensors", "dim")
    older, *newer = args["tensors"]
    if args.get("dim", 0) not in (TOKENS, TOKENS - 4) or len(newer) != 1:
        return None
    if not fx.is_op(older, ops.DEQUANTIZE) or fx.value(older).dtype != fx.value(newer[0]).dtype:
        return None
    given = fx.bind_schema(older)
    return [given["codes"], given["ranges"], given["centre"], newer[0]]


def _result(node: Node) -> Node | None:
    """The node that holds what attention returns, if nobody reads what else it computes."""
    if fx.shape(node):
        return node
    read = [item for item in fx.items_of(node) if item[0].users]
    return read[0][0] if len(read) == 1 == len(node.users) and read[0][1] == 0 else None


def _read_sizes_of(out: Any, node: Node, shape: list[Any]) -> None:
    """Reads later sizes of what is computed from `node` off `out`, of `shape`, where it has them.

    torch 2.11 reads the head size of a result off the values. For that alone they would be made.
    """
    queue, seen = [node], set()
    while queue:
        node = queue.pop()
        if node in seen or node > out.node:
            continue
        seen.add(node)
        queue += node.users
        for size in [user for user in node.users if fx.is_op(user, ops.SIZE) and user > out.node]:
            for item, number in fx.items_of(size):
                equal = [i for i, n in enumerate(shape) if fx.same(n, fx.shape(node)[number])]
                if equal:
                    with size.graph.inserting_before(item):
                        item.replace_all_uses_with(out.size(equal[-1]).node)
                    size.graph.erase_node(item)
            if not size.users:
                size.graph.erase_node(size)


def _erase(context: Context, node: Node) -> None:
    """Erases a node that nobody reads, and what was computed for it alone."""
    queue = [node]
    while queue:
        node = queue.pop()
        if node.users or not node.op.startswith("call_") or not _writes_to_products(node):
            continue
        queue += fx.producers(node)
        context.graph.erase_node(node)
        queue = [source for source in queue if source is not node]


def _writes_to_products(node: Node) -> bool:
    """Whether all that `node` changes in place, if anything, are products that it alone reads."""
    return all(
        set(tensor.users) == {node}
        and (fx.is_op(tensor, PRODUCT) or bool(written_by(tensor)))
        and _writes_to_products(tensor)
        for tensor in written_by(node)
    )
