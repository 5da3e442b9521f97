"""Finds the attention of prompts, in the forms of `passes.forms`. Analysis only."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from . import forms, fx
from .base import Context, GraphPass
from .sites import Site


class FindAttention(GraphPass):
    """Fills `context.sites`. Attention of a single query (decoding) is only counted.

    What looks like attention but fits no form is refused, with the reason.
    """

    def run(self, context: Context) -> None:
        for node in context.graph.nodes:
            attention = forms.read(node)
            reason = forms.why_not(node) if attention is None else None
            if attention is not None or reason is not None:
                context.attentions.add(node)
            if reason is not None and not _is_one(fx.shape(node)[-2:-1]):
                context.refuse(reason, node)
            if attention is None:
                continue
            if not fx.shape(attention.query):
                context.refuse(forms.NO_VALUES, node)
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
                context.refuse(
                    "the number of query heads is not a multiple of that of KV heads", node, site
                )
            elif attention.aligned_last or not unmasked or not attention.causal:
                continue
            elif not bool(queries == keys):
                context.refuse(
                    "is_causal with more keys than queries aligns the mask to the first key, so "
                    "the last queries do not see the last keys",
                    node,
                    site,
                )


def _is_one(queries: tuple[Any, ...]) -> bool:
    """Whether there is a single query, as in decoding."""
    return queries == (1,) and isinstance(queries[0], int)


def _is_cached(key: Node) -> bool:
    """Whether a cache stores these keys. Then it is a prompt that sees all of itself."""
    return any(fx.is_op(user, fx.CACHE_WRITE) for user in key.users)
