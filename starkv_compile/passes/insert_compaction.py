"""Replace what is stored by what is kept. Attention of this step still reads everything."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ..kernels.ops import STARKV
from . import fx
from .base import Context, GraphPass, without_gradient
from .sites import INDEX, NOVELTY, STATE, CacheWrite, Inserted


class InsertCompaction(GraphPass):
    """Before: `return k, v` (or `starkv.cache_write(k, v, ...)`).

    After: `kept = starkv.select_tokens(scores, ...)`; `return starkv.gather_kv(k, v, kept)`.

    Inductor would fuse small kernels of all layers into one that runs last, and every layer's whole
    keys and values would live until then. Hence `starkv.after(y, k', v')`: attention's result is
    read, and the next layer begun, when this one is compacted.
    """

    def run(self, context: Context) -> None:
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
                stored = [pair[0], pair[1]]
                if write.marker is not None:
                    stored.append(scored.index.gather(-1, kept))
                    stored.append(scored.novelty.gather(-1, kept))
                    stored.extend(scored.state)
            new = [proxy.node for proxy in stored]
            if self.config.inner == "inductor" and context.cache != "caller":
                _wait(context, site.attention.node, new[0], new[1])
            if write.marker is None:
                _replace_outputs(context.graph, {write.key: new[0], write.value: new[1]})
            else:
                replace_marker(context.graph, write, new)
            context.rewritten.append(site)
            self.matched += 1


class StripMarkers(GraphPass):
    """Where everything is kept: `starkv.cache_write(k, v, ...)` becomes its own inputs."""

    def run(self, context: Context) -> None:
        for marker in list(context.graph.nodes):
            if fx.is_op(marker, fx.CACHE_WRITE):
                args = marker.args
                same = [*args[:2], args[INDEX], args[NOVELTY], *args[STATE]]
                replace_marker(context.graph, CacheWrite(args[0], args[1], marker), same)
                self.matched += 1


def _end_of_scores(scored: Inserted) -> Node:
    """The node before which compaction goes: after attention and after its scores."""
    node = scored.scores.node
    told = [] if scored.novelty is None else [scored.novelty]
    for proxy in (*scored.state, *told):
        if node < proxy.node:
            node = proxy.node
    return node.next


def _wait(context: Context, attention: Node, key: Node, value: Node) -> None:
    """Let nothing read the attention's result before key and value exist."""
    result = _result(attention)
    if fx.has_gradient(result):
        return  # to be differentiated, and then nothing may seem to write to it
    with context.graph.inserting_after(max(result, key, value)):
        context.graph.call_function(STARKV.after.default, (result, key, value))


def _result(attention: Node) -> Node:
    """What attention computes, where the node also gives, or is, its log-sum-exp."""
    whole = attention.args[0] if attention.target is operator.getitem else attention
    assert isinstance(whole, Node)
    if isinstance(fx.value(whole), torch.Tensor):
        return attention
    return next(item for item in whole.users if item.args[1:] == (0,))


def _replace_outputs(graph: torch.fx.Graph, new: dict[Node, Node]) -> None:
    output = graph.output_node()
    output.args = torch.fx.node.map_arg(output.args, lambda n: new.get(n, n))


def replace_marker(graph: torch.fx.Graph, write: CacheWrite, new: list[Any]) -> None:
    """Let what read result i of the marker read `new[i]`, and remove the marker."""
    marker = write.marker
    assert marker is not None
    for item in list(marker.users):
        item.replace_all_uses_with(new[item.args[1]])  # type: ignore[index]
        graph.erase_node(item)
    graph.erase_node(marker)
