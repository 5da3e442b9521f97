"""Finds the input of each attention's key projection, for the spatial boost."""

from __future__ import annotations

from collections import deque

from torch.fx import Node

from . import fx, ops
from .base import Context, GraphPass
from .functional import is_intact
from .sites import Refusal, Site


class FindHidden(GraphPass):
    """Walks back from the new keys to the nearest linear layer, and takes that layer's input.

    Without one, the layer is still compressed, but scored without the boost, and the report notes
    it.
    """

    def run(self, context: Context) -> None:
        for site in list(context.sites):
            hidden = self._input_of_key_projection(site)
            copied = None if hidden is None else context.functional.copied(hidden)
            if not is_intact(copied, site.found.node):
                hidden = None  # written to in place by now
            if hidden is None:
                reason = "no linear layer found behind the keys, so scores have no spatial boost"
                context.notes.append(Refusal(reason, site.attention.key.name, site.index))
                continue
            context.update(site, hidden=hidden)
            self.matched += 1

    def _input_of_key_projection(self, site: Site) -> Node | None:
        new_tokens = fx.shape(site.attention.query)[2]
        batch = fx.shape(site.attention.query)[0]
        assert site.write is not None
        for node in _backwards(fx.newest(site.write.key)):
            if not fx.is_op(node, ops.LINEAR):
                continue
            source = fx.operand(node)
            if node.target is fx.aten.addmm.default:
                source = fx.bind(node, "input", "mat1", "mat2")["mat1"]
            for read in fx.through(source, fx.see_through_copies, _before_view):
                dims = fx.shape(read)
                if len(dims) == 3 and bool(dims[0] == batch) and bool(dims[1] == new_tokens):
                    return read
        return None


def _before_view(node: Node) -> Node | None:
    """The [B, S, E] behind the [B * S, E] that ATen's linear layers read."""
    return fx.operand(node) if fx.is_op(node, ops.RESHAPE) else None


def _backwards(start: Node) -> list[Node]:
    """Nodes behind `start`, nearest first."""
    order: list[Node] = []
    queue, known = deque([start]), {start}
    while queue:
        node = queue.popleft()
        order.append(node)
        for producer in fx.producers(node):
            if producer not in known:
                known.add(producer)
                queue.append(producer)
    return order
