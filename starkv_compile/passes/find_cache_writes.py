"""Finds where the keys and values of each attention leave the graph. Analysis only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ..policies import POLICIES
from . import forms, fx, ops
from .base import Context, GraphPass
from .functional import changed
from .markers import arguments_of, find_markers
from .returned import Lengths, Outputs, joined
from .sites import CacheWrite, Site

TOKENS = 2
"""The dimension of tokens in [B, G, L, D]."""
OWN_MASK = (
    "the model makes a mask without asking the cache how many columns it needs, so later masks "
    "would have one for each token seen, not for each token stored; make it with "
    "create_causal_mask of transformers.masking_utils, or with cache.get_mask_sizes(tokens, layer)"
)
IN_ANOTHER_GRAPH = (
    "its keys and values come from another graph, because Dynamo broke the model's graph before "
    "the attention; TORCH_LOGS=graph_breaks shows the line to change"
)
NOT_RETURNED = (
    "the graph does not return the keys and values that attention reads (as [B, G, L, D], in "
    "another order, or stacked), or changes them afterwards; let it return them"
)
IN_BUFFERS = (
    "keys and values are in a buffer of a fixed size, which the graph writes in place ({}), and "
    "starkv cannot shorten that; let the graph return the keys and values of the tokens so far, "
    "and let attention read those"
)
IN_PARTS = (
    "keys and values are written part by part into a longer tensor, and it is unclear which of its "
    "tokens are real; join cached and new tokens with torch.cat"
)
MIXED = (
    "the graph returns these keys and values in one tensor with others that keep all their tokens; "
    "let it return each layer's by themselves"
)


CROSS = "the keys belong to other tokens than the queries (cross-attention)"
ONE_MASK = (
    "another layer keeps every token, because starkv cannot read its attention, and a model has "
    "one mask for all its layers; compute all of them with "
    "torch.nn.functional.scaled_dot_product_attention"
)


BY_PLACE = (
    "the keys or values that attention reads are computed from what is stored and from the places "
    "of its tokens, or from other tokens, so they would change when tokens are dropped; put rotary "
    "positions on keys before the cache stores them"
)


class FindCacheWrites(GraphPass):
    """Finds a marker that `StarKVCache` left, or a key and a value that are graph outputs.

    Outputs count only if the caller looks after the cache. Keys and values also leave a graph where
    it breaks, or where one block of a model ends.
    """

    def run(self, context: Context) -> None:
        functional = context.functional
        markers = [] if context.cache == "nobody" else find_markers(functional.graph)
        outputs = Outputs(functional.graph) if context.cache == "caller" else None
        written: set[Node] = set()
        apart: set[Node | None] = set()  # markers of layers whose length is their own
        for site in list(context.sites):
            write = (
                _marked(site, markers, context)
                or _marked_latents(site, markers, context)
                or (None if outputs is None else _returned(site, outputs))
            )
            if write is None:
                context.refuse(_not_whole(context, site), site.attention.node, site)
                continue
            reason = self._reason_against(context, site, write)
            if write.key in written:
                reason = "it reads another layer's keys and values, and that layer compresses them"
            if reason is not None:
                apart |= {write.marker} if reason == CROSS else set()
                context.refuse(reason, site.attention.node, site)
                continue
            context.update(site, write=write)
            written.add(write.key)
            self.matched += 1
        if outputs is not None:
            self._refuse_mixed(context, outputs)
        if not self.config.is_uneven:
            apart |= {site.write.marker for site in context.sites if site.write is not None}
            if not {context.functional.given(marker) for marker in markers} <= apart:
                for site in list(context.sites):
                    context.refuse(ONE_MASK, site.attention.node, site)

    def _refuse_mixed(self, context: Context, outputs: Outputs) -> None:
        """Refuses sites whose keys and values are returned in one tensor with longer ones."""
        uneven = self.config.is_uneven  # then no two layers keep the same number of tokens
        while True:
            lengths = lengths_of(context.sites)
            mixed = [
                site
                for site in context.sites
                for known in [lengths_of([site]) if uneven else lengths]
                if not all(outputs.are_whole(node, known) for node in lengths_of([site]))
            ]
            if not mixed:
                return
            for site in mixed:
                context.refuse(MIXED, site.attention.node, site)

    def _reason_against(self, context: Context, site: Site, write: CacheWrite) -> str | None:
        attention = site.attention
        queries = fx.shape(attention.query)[2]
        if context.cache != "caller" and _has_bias(attention.mask):
            return f"the mask adds a different bias for each head; {forms.NO_BIAS}"
        if write.marker is None:
            return _in_parts(context, site)
        given = arguments_of(write.marker)
        if not given.mask_fits and (attention.mask is not None or attention.mask_function):
            return OWN_MASK
        if not bool(fx.shape(fx.newest(write.key))[2] == queries):
            return CROSS
        if not write.by_token:
            return BY_PLACE
        by_head = len(fx.shape(given.place)) == 3
        if by_head and not self.config.policy.per_head:
            return (
                "the cache holds a different set of tokens for each head, but policy "
                f"{self.config.policy.name!r} keeps one set; begin a new cache, or continue "
                f"with a policy that keeps a set for each head ({_names_per_head()})"
            )
        return None


def _names_per_head() -> str:
    return ", ".join(name for name, policy in POLICIES.items() if policy.per_head)


def _has_bias(mask: Node | None) -> bool:
    """Whether a mask, [B, H, S, L] or [H, S, L], holds different numbers for each head."""
    while fx.is_op(mask, ops.EXPAND):
        mask = fx.operand(mask)  # type: ignore[arg-type]
    tensor = fx.value(mask)
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        return False
    return tensor.dim() >= 3 and bool(tensor.shape[-3] != 1)


def lengths_of(sites: list[Site]) -> Lengths:
    """The tensors in graph outputs that get fewer tokens, each with its dimension of tokens."""
    writes = (site.write for site in sites if site.write is not None)
    return {node: dim for write in writes for node, dim, _ in write.stored}


def _not_whole(context: Context, site: Site) -> str:
    """Why keys and values that are stored nowhere cannot be shortened."""
    if context.cache == "caller":
        return _in_parts(context, site) or NOT_RETURNED
    if context.cache == "marked" and site.attention.key.op == "placeholder":
        return IN_ANOTHER_GRAPH
    return context.unmarked


def _in_parts(context: Context, site: Site) -> str | None:
    """Says that keys or values are in a tensor whose tokens are written part by part, if so."""
    for operand in (site.found.key, site.found.value):
        steps = list(fx.through(operand.node, _written_into))
        given = context.functional.given(steps[-1])
        if given in context.functional.written and given.op in ("placeholder", "get_attr"):
            return IN_BUFFERS.format(given.target)
        if any(not _leaves_tokens(step) for step in steps):
            return IN_PARTS
    return None


def _written_into(node: Node) -> Node | None:
    """The tensor into which `node` writes, or of which it is a view or a copy."""
    written = ops.INDEX_PUT + ops.SET_ITEM + ops.INDEX_COPY + ops.SLICE_SCATTER + ops.SELECT_SCATTER
    views = ops.SLICE + ops.SELECT + ops.RESHAPE + ops.UNSQUEEZE + ops.EXPAND + ops.REPEAT
    alike = fx.is_op(
        node,
        (
            changed,
            *written,
            *ops.OVERWRITE,
            *views,
            *ops.CAST,
            *ops.COPY,
            *ops.PAD,
        ),
    )
    source = fx.operand(node) if alike or fx.order_of_dims(node) else None
    return source if isinstance(source, Node) and fx.shape(source) else None


def _leaves_tokens(node: Node) -> bool:
    """Whether a write, if `node` is one, is to the same elements of every vector."""
    rank = len(fx.shape(node))
    if node.target is changed:
        whole, part = fx.shape(node), fx.shape(node.args[1])
        return len(whole) == len(part) and all(map(fx.same, whole[:-1], part[:-1]))
    if fx.is_op(node, ops.SET_ITEM):
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        index = index if ... in index or len(index) == rank else (*index, ...)
        return all(entry is ... or entry == slice(None) for entry in index[:-1])
    if fx.is_op(node, ops.SLICE_SCATTER):
        return fx.bind(node, "input", "src", "dim").get("dim", 0) % rank == rank - 1
    if fx.is_op(node, ops.PAD):
        return fx.see_through_padding(node) is not None
    return not fx.is_op(node, ops.INDEX_PUT + ops.INDEX_COPY + ops.SELECT_SCATTER)


def _marked(site: Site, markers: list[Node], context: Context) -> CacheWrite | None:
    key, value = site.found.key, site.found.value
    if not key.is_plain or not value.is_plain:
        return None
    for marker in markers:
        written = arguments_of(marker)
        if (written.key, written.value) == (key.node, value.node):
            given = context.functional.given(marker)
            return CacheWrite(site.attention.key, site.attention.value, given)
    return None


def _marked_latents(site: Site, markers: list[Node], context: Context) -> CacheWrite | None:
    """The marker of latents from which this layer's keys and values are computed."""
    found = site.found
    before = [marker for marker in markers if marker < found.node]
    if not before:
        return None
    marker = before[-1]
    written = arguments_of(marker)
    key, value = written.key, written.value
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    heads, stored = fx.shape(site.attention.key)[1], fx.shape(key)[1]
    same_tokens = bool(fx.shape(key)[2] == fx.shape(site.attention.key)[2])
    if not same_tokens or stored != fx.shape(value)[1] or heads % stored:
        return None
    # What lies beyond an earlier attention's output, or before the latents, is another layer.
    first = min(key, value)
    sources = {found.key.node, found.value.node}
    made_of = _made_of(sources, lambda n: n in context.attentions or n < first)
    if not {key, value} <= made_of:
        return None
    latents = _made_from({key, value}, made_of)
    by_token = all(_is_by_token(n, latents, fx.shape(key)[2]) for n in latents - {key, value})
    given = context.functional.given
    return CacheWrite(given(key), given(value), given(marker), by_token=by_token)


def _made_from(nodes: set[Node], within: set[Node]) -> set[Node]:
    """`nodes` and everything of `within` that is computed from them."""
    found = set(nodes)
    for node in sorted(within):  # in the order of the graph
        if not found.isdisjoint(fx.producers(node)):
            found.add(node)
    return found


def _is_by_token(node: Node, latents: set[Node], tokens: Any) -> bool:
    """Whether a node makes each token's vector of that token's latents alone, wherever it stands.

    Otherwise its result would be another after some tokens were dropped: rotary positions that are
    put on stored keys, a sum over neighbours. A tensor with a line for each token tells places.
    """
    if fx.is_op(node, ops.ACROSS_TOKENS):
        return False
    sizes = fx.shape(node)
    if sizes and not any(_is_multiple(size, tokens) for size in sizes):
        return False
    others = [n for n in fx.producers(node) if n not in latents]
    return not any(fx.same(size, tokens) for n in others for size in _sizes_of_places(n))


def _sizes_of_places(node: Node) -> tuple[Any, ...]:
    """The sizes of a tensor that may hold places; () for weights."""
    return () if isinstance(fx.value(node), torch.nn.Parameter) else fx.shape(node)


def _is_multiple(size: Any, tokens: Any) -> bool:
    """Whether rows and tokens may lie in one dimension of this size, by the traced sizes."""
    size, tokens = (n.node.hint if isinstance(n, torch.SymInt) else n for n in (size, tokens))
    return size is None or tokens is None or (size > 0 and size % tokens == 0)


def _returned(site: Site, outputs: Outputs) -> CacheWrite | None:
    """The key and the value in the graph's outputs, by themselves or as halves of one tensor."""
    key, value = site.found.key, site.found.value
    write = CacheWrite(site.attention.key, site.attention.value, None)
    by_themselves = outputs.made_of(key.node) and outputs.made_of(value.node)
    if by_themselves and min(key.dim(TOKENS), value.dim(TOKENS)) >= 0:
        of_key = (key.node, key.dim(TOKENS), lambda k, v: key.back(k))
        of_value = (value.node, value.dim(TOKENS), lambda k, v: value.back(v))
        return replace(write, stored=(of_key, of_value))
    pair, place = joined(key.node, value.node), key.dim(TOKENS)
    if pair is None or place < 0 or place != value.dim(TOKENS) or not outputs.made_of(pair.whole):
        return None
    if pair.is_stack:
        place += pair.dim <= place
    elif pair.dim == place:
        return None

    def both(k: Any, v: Any) -> Any:
        return pair.together(key.back(k), value.back(v))

    return replace(write, stored=((pair.whole, place, both),))


def _made_of(nodes: set[Node], beyond: Callable[[Node], bool]) -> set[Node]:
    """`nodes` and everything they are computed from, without what lies `beyond`."""
    found, queue = set(nodes), list(nodes)
    while queue:
        new = {n for n in fx.producers(queue.pop()) if n not in found and not beyond(n)}
        found |= new
        queue += new
    return found
