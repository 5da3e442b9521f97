"""Finds the attention of prompts, in the forms of `passes.forms`. Analysis only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import Node

from . import forms, fx, ops
from .base import Context, GraphPass
from .sites import Attention, Site


class FindAttention(GraphPass):
    """Fills `context.sites`. Attention of a single query (decoding) is only counted.

    What looks like attention but fits no form is refused, with the reason.
    """

    def run(self, context: Context) -> None:
        for node in list(context.functional.graph.nodes):
            attention = forms.read(node)
            reason = forms.why_not(node) if attention is None else None
            if attention is not None or reason is not None:
                context.attentions.add(node)
            if reason is not None and not _is_one(fx.shape(node)[-2:-1]):
                context.refuse(reason, context.functional.given(node))
            if attention is not None:
                self._look_at(context, attention)

    def _look_at(self, context: Context, found: Attention) -> None:
        """Makes a site of an attention of a prompt, and counts others."""
        node = context.functional.given(found.node)
        query, key = (fx.shape(operand) for operand in (found.query, found.key.computed()))
        if not query:
            context.refuse(forms.NO_VALUES, node)
            return
        masked = found.mask is not None or bool(found.mask_function)
        if len(query) != 4:
            if masked or found.causal:
                context.refuse(forms.NOT_4D, node)
            return
        if _is_one((query[2],)):
            context.decode_sites += 1
            return
        if not masked and not found.causal and not _is_cached(found.key.node):
            context.encoder_sites += 1
            return
        with context.graph.inserting_before(node):
            attention = replace(
                found,
                node=node,
                mask_function=tuple(map(context.functional.given, found.mask_function)),
                **{
                    name: context.compute(getattr(found, name))
                    for name in ("query", "key", "value", "mask")
                },
            )
        site = Site(len(context.sites) + len(context.refusals), attention, found)
        context.sites.append(site)
        self.matched += 1
        reason = None
        if query[1] % key[1]:
            reason = "the number of query heads is not a multiple of that of KV heads"
        elif found.causal and not masked and not found.aligned_last and query[2] != key[2]:
            reason = (
                "is_causal with more keys than queries aligns the mask to the first key, so the "
                "last queries do not see the last keys"
            )
        if reason is not None:
            context.refuse(reason, node, site)


def _is_one(queries: tuple[Any, ...]) -> bool:
    """Whether there is a single query, as in decoding."""
    return queries == (1,) and isinstance(queries[0], int)


def _is_cached(key: Node) -> bool:
    """Whether a cache stores these keys. Then it is a prompt that sees all of itself."""
    return any(fx.is_op(user, ops.CACHE_WRITE) for user in key.users)
