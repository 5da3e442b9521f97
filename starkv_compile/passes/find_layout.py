"""Finds what each token is (text, or a place on a frame) if the cache does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..kernels.ops import STARKV
from ..kernels.reference.star import Layout
from . import fx, ops
from .base import Context, GraphPass
from .markers import arguments_of
from .sites import Refusal, Site


class FindLayout(GraphPass):
    """Takes the layout from the marker, M-RoPE position ids, or the merging of image embeddings.

    Without any of them every token counts as text, and the report notes it.
    """

    def run(self, context: Context) -> None:
        inferred: Layout | None = None
        for site in list(context.sites):
            marker = site.write.marker if site.write else None
            given = None if marker is None else arguments_of(marker)
            if given is not None and given.has_layout:
                context.update(site, layout=Layout(*map(context.proxy, given.layout)))
                self.matched += 1
                continue
            if inferred is None:
                inferred = self._infer(context, site)
            context.update(site, layout=inferred)
            self.matched += 1

    def _infer(self, context: Context, site: Site) -> Layout:
        batch, _, tokens, _ = fx.shape(site.attention.query)
        whole_prompt = bool(tokens == fx.shape(site.attention.key)[2])
        source = _positions(context.graph, batch, tokens) if whole_prompt else None
        op = STARKV.layout_from_positions
        if source is None and whole_prompt:
            source = _image_mask(context.graph, batch, tokens)
            op = STARKV.layout_from_image_mask
        if source is None:
            reason = "nothing shows which tokens are visual, so all are scored as text"
            context.notes.append(Refusal(reason, site.attention.node.name))
            return _emit(context, STARKV.layout_all_text, site.attention.key)
        return _emit(context, op, source)


def _emit(context: Context, op: Any, source: Node) -> Layout:
    """Calls `op` right after `source`. Returns its results."""
    with context.graph.inserting_after(source):
        described = context.graph.call_function(op, (source,))
    with context.graph.inserting_before(described.next):
        return Layout(*(context.proxy(described)[i] for i in range(len(Layout._fields))))


def _positions(graph: torch.fx.Graph, batch: Any, tokens: Any) -> Node | None:
    """An input of M-RoPE position ids: int64 [3 or 4, B, S]."""
    for node in graph.find_nodes(op="placeholder"):
        tensor = fx.value(node)
        if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int64 and tensor.dim() == 3:
            kinds, rows, length = tensor.shape
            if kinds in (3, 4) and bool(rows == batch) and bool(length == tokens):
                return node
    return None


def _image_mask(graph: torch.fx.Graph, batch: Any, tokens: Any) -> Node | None:
    """The mask that merges image embeddings, before it was widened: bool [B, S]."""
    for node in graph.nodes:
        if not fx.is_op(node, ops.MASKED_SCATTER):
            continue
        mask = fx.bind(node, "input", "mask", "source")["mask"]
        for source in fx.through(mask, lambda n: next(iter(fx.producers(n)), None)):
            tensor = fx.value(source)
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.bool:
                break
            if tensor.dim() == 2 and bool(tensor.shape[0] == batch and tensor.shape[1] == tokens):
                return source
    return None
