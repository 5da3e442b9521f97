"""Put the policy's scores into the graph, right after each attention."""

from __future__ import annotations

from typing import Any

import torch

from ..kernels.ops import STARKV
from ..policies import POLICIES, ScoreInputs
from . import fx
from .base import Context, GraphPass
from .sites import Inserted, Site

STATE = slice(7, 11)  # arguments of starkv.cache_write
SEEN = 11


class InsertScores(GraphPass):
    """`sdpa(q, k, v)` is followed by `scores, state = policy.score(q, k, ...)`."""

    def run(self, context: Context) -> None:
        policy = POLICIES[self.config.policy](self.config)
        for site in list(context.sites):
            attention, write = site.attention, site.write
            assert write is not None
            assert site.layout is not None
            marker = write.marker
            with context.graph.inserting_before(attention.node.next):
                query, key = context.proxy(attention.query), context.proxy(attention.key)
                if marker is None:
                    state = STARKV.fresh_state(key, site.layout[3])
                    state = tuple(state[i] for i in range(4))
                    seen = key.shape[2]
                else:
                    state = tuple(context.proxy(a) for a in marker.args[STATE])
                    seen = context.proxy(marker.args[SEEN])
                capacity = self.config.capacity(seen)
                mask = _mask(context, site)
                real = _real_tokens(context, site, mask)
                scored = policy.score(
                    ScoreInputs(
                        query=self._checked(query, f"layer {site.index}, queries"),
                        key=self._checked(key, f"layer {site.index}, keys"),
                        mask=mask,
                        scale=context.proxy(attention.scale),
                        log_sum_exp=context.proxy(site.log_sum_exp),
                        hidden=context.proxy(site.hidden),
                        real=real,
                        layout=site.layout,
                        state=state,
                        capacity=capacity,
                    )
                )
            context.update(site, scored=Inserted(scored.scores, scored.state, real, capacity))
            self.matched += 1

    def _checked(self, tensor: Any, name: str) -> Any:
        return STARKV.check_finite(tensor, name) if self.config.debug else tensor


def _mask(context: Context, site: Site) -> Any:
    """The mask with the leading dimensions that attention would broadcast, or None."""
    mask = context.proxy(site.attention.mask)
    missing = 0 if mask is None else 4 - len(fx.shape(site.attention.mask))
    return mask[(None,) * missing] if missing else mask


def _real_tokens(context: Context, site: Site, mask: Any) -> Any:
    """[B, L] bool, what the last query sees: padding is what it does not. None without a mask."""
    if site.attention.mask is None:
        return None
    last = mask[:, 0, -1, :]
    dtype = fx.value(site.attention.mask).dtype
    if dtype != torch.bool:
        last = last > torch.finfo(dtype).min / 2
    return last.expand(context.proxy(site.attention.query).shape[0], -1)
