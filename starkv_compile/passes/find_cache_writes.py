"""Finds where the keys and values of each attention leave the graph. Analysis only."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
from torch.fx import Node

from ..policies import POLICIES
from . import forms, fx
from .base import Context, GraphPass
from .markers import arguments_of, find_markers
from .sites import Attention, CacheWrite

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
    "the graph does not return its keys and values in the form in which the attention reads them, "
    "[batch, KV heads, tokens, head dimension]"
)


class FindCacheWrites(GraphPass):
    """Finds a marker that `StarKVCache` left, or a key and a value that are graph outputs.

    Outputs count only if the caller looks after the cache. Keys and values also leave a graph where
    it breaks, or where one block of a model ends.
    """

    def run(self, context: Context) -> None:
        by_caller = context.cache == "caller"
        markers = [] if context.cache == "nobody" else find_markers(context.graph)
        returned = set(fx.outputs(context.graph)) if by_caller else set()
        written: set[Node] = set()
        for site in list(context.sites):
            attention = site.attention
            write = (
                _marked(attention, markers)
                or _marked_latents(attention, markers, context.attentions)
                or _returned(attention, returned)
            )
            if write is None:
                context.refuse(self._why_no_write(context, attention), attention.node, site)
                continue
            reason = self._reason_against(context, attention, write)
            if write.key in written:
                reason = "it reads another layer's keys and values, and that layer compresses them"
            if reason is not None:
                context.refuse(reason, attention.node, site)
                continue
            context.update(site, write=write)
            written.add(write.key)
            self.matched += 1

    def _why_no_write(self, context: Context, attention: Attention) -> str:
        if context.cache == "nobody":
            return context.unmarked
        if attention.key.op == "placeholder":
            return IN_ANOTHER_GRAPH
        return NOT_RETURNED if context.cache == "caller" else context.unmarked

    def _reason_against(
        self, context: Context, attention: Attention, write: CacheWrite
    ) -> str | None:
        queries = fx.shape(attention.query)[2]
        if context.cache != "caller" and _has_bias(attention.mask):
            return f"the mask adds a different bias for each head; {forms.NO_BIAS}"
        if write.marker is None:
            return None
        given = arguments_of(write.marker)
        if not given.mask_fits and (attention.mask is not None or attention.mask_function):
            return OWN_MASK
        if not bool(fx.shape(fx.newest(write.key))[2] == queries):
            return "the keys belong to other tokens than the queries (cross-attention)"
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
    while fx.is_op(mask, fx.EXPAND):
        mask = fx.operand(mask)  # type: ignore[arg-type]
    tensor = fx.value(mask)
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        return False
    return tensor.dim() >= 3 and bool(tensor.shape[-3] != 1)


def _marked(attention: Attention, markers: list[Node]) -> CacheWrite | None:
    for marker in markers:
        written = arguments_of(marker)
        if (written.key, written.value) == (attention.key, attention.value):
            return CacheWrite(attention.key, attention.value, marker)
    return None


def _marked_latents(
    attention: Attention, markers: list[Node], attentions: set[Node]
) -> CacheWrite | None:
    """The marker of latents from which this layer's keys and values are computed."""
    before = [marker for marker in markers if marker < attention.node]
    if not before:
        return None
    marker = before[-1]
    written = arguments_of(marker)
    key, value = written.key, written.value
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    heads, stored = fx.shape(attention.key)[1], fx.shape(key)[1]
    same_tokens = bool(fx.shape(key)[2] == fx.shape(attention.key)[2])
    if not same_tokens or stored != fx.shape(value)[1] or heads % stored:
        return None
    # What lies beyond an earlier attention's output, or before the latents, is another layer.
    first = min(key, value)
    made_of = _made_of({attention.key, attention.value}, lambda n: n in attentions or n < first)
    if not {key, value} <= made_of:
        return None
    return CacheWrite(key, value, marker)


def _returned(attention: Attention, returned: set[Node]) -> CacheWrite | None:
    if attention.key in returned and attention.value in returned:
        return CacheWrite(attention.key, attention.value, None)
    return None


def _made_of(nodes: set[Node], beyond: Callable[[Node], bool]) -> set[Node]:
    """`nodes` and everything they are computed from, without what lies `beyond`."""
    found, queue = set(nodes), list(nodes)
    while queue:
        node = queue.pop()
        sources = {source for n in (node, *_fillings(node)) for source in fx.producers(n)}
        new = {n for n in sources - found if not beyond(n)}
        found |= new
        queue += new
    return found


def _fillings(node: Node) -> Iterator[Node]:
    """What writes into slices of `node`: `node[i] = x`, `node[i].copy_(x)`."""
    for user in node.users:
        if user.target is operator.setitem:
            yield user
        elif user.target is operator.getitem:
            yield from (write for write in user.users if write.target == "copy_")
