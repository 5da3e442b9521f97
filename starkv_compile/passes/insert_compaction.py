"""Replaces what is stored by what is kept. The prompt's own attention still reads everything."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ..kernels.marker import Written
from ..kernels.ops import STARKV
from . import fx
from .base import Context, GraphPass, without_gradient
from .find_cache_writes import lengths_of
from .markers import arguments_of, find_markers, replace_marker
from .returned import Lengths, Outputs
from .sites import Inserted


class InsertCompaction(GraphPass):
    """Before: `return k, v` (or `starkv.cache_write(k, v, ...)`).

    After: `kept = starkv.select_tokens(scores, ...)`; `return starkv.gather_kv(k, v, kept)`.

    Inductor would fuse small kernels of all layers into one that runs last, and every layer's full
    keys and values would live until then. So `starkv.after(y, k', v')` makes the readers of y, and
    with them the next layer, wait until this layer is compacted.
    """

    def run(self, context: Context) -> None:
        lengths, returned = lengths_of(context.sites), {}
        for site in list(context.sites):
            write = site.write
            scored = site.scored
            assert write is not None
            assert scored is not None
            with context.graph.inserting_before(_end_of_scores(scored)):
                key = without_gradient(context.proxy(write.key))
                value = without_gradient(context.proxy(write.value))
                kept = STARKV.select_tokens(
                    scored.scores, scored.real, key.shape[2], scored.window, scored.capacity
                )
                pair = STARKV.gather_kv(key, value, kept, scored.real)
                new_key, new_value = pair[0].node, pair[1].node
                for node, _, make in write.stored:
                    returned[node] = make(pair[0], pair[1])
                if write.marker is not None:
                    state = {name: proxy.node for name, proxy in scored.state._asdict().items()}
                    written = Written(
                        key=new_key,
                        value=new_value,
                        place=scored.place.gather(-1, kept).node,
                        novelty=scored.novelty.gather(-1, kept).node,
                        **state,
                    )
                    replace_marker(write.marker, written)
            compiled_here = context.cache != "caller" or self.config.shorten_outputs
            if self.config.inner == "inductor" and compiled_here:
                _wait(context, site.attention.node, new_key, new_value)
            context.rewritten.append(site)
            self.matched += 1
        if returned:
            _replace_outputs(context, lengths, returned)


class StripMarkers(GraphPass):
    """Replaces the results of `starkv.cache_write(k, v, ...)` by its arguments: all tokens stay."""

    def run(self, context: Context) -> None:
        for marker in find_markers(context.graph):
            replace_marker(marker, arguments_of(marker).unchanged)
            self.matched += 1


def _end_of_scores(scored: Inserted) -> Node:
    """The node before which compaction is inserted: after attention and after its scores."""
    node = scored.scores.node
    novelty = [] if scored.novelty is None else [scored.novelty]
    for proxy in (*scored.state, *novelty):
        if node < proxy.node:
            node = proxy.node
    return node.next


def _wait(context: Context, attention: Node, key: Node, value: Node) -> None:
    """Makes readers of the attention's result wait until key and value exist."""
    result = _result(attention)
    if fx.has_gradient(result):
        return  # it will be differentiated, so nothing may seem to write to it
    with context.graph.inserting_after(max(result, key, value)):
        context.graph.call_function(STARKV.after.default, (result, key, value))


def _result(attention: Node) -> Node:
    """The output of attention, also if the node returns or is its log-sum-exp."""
    whole = attention.args[0] if attention.target is operator.getitem else attention
    assert isinstance(whole, Node)
    if isinstance(fx.value(whole), torch.Tensor):
        return attention
    return next(item for item, place in fx.items_of(whole) if place == 0)


def _replace_outputs(context: Context, lengths: Lengths, new: dict[Node, Any]) -> None:
    """Returns shorter tensors in the place of outputs that are made of keys and values."""
    functional, output = context.functional, context.graph.output_node()
    given = context.functional.graph.output_node()
    with context.graph.inserting_before(output):
        outputs = Outputs(functional.graph)
        shorter = {node: proxy.node for node, proxy in outputs.rebuilt(lengths, new)}
    # Both graphs return the same tensors in the same places.
    old = iter(_in_order(given))
    output.args = torch.fx.node.map_arg(output.args, lambda n: shorter.get(next(old), n))


def _in_order(output: Node) -> list[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg(output.args, found.append)
    return found
