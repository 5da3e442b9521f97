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
                key = context.proxy(attention.key)
                if marker is None:
                    state = STARKV.fresh_state(key, site.layout[3])
                    state = tuple(state[i] for i in range(4))
                    seen = key.shape[2]
                else:
                    state = tuple(context.proxy(a) for a in marker.args[STATE])
                    seen = context.proxy(marker.args[SEEN])
                capacity = self.config.capacity(seen)
                groups = fx.shape(attention.key)[1]
                real = _real_tokens(context, site)
                scored = policy.score(
                    ScoreInputs(
                        query=context.proxy(attention.query),
                        key=key,
                        mask=context.proxy(attention.mask),
                        scale=context.proxy(attention.scale),
                        hidden=context.proxy(site.hidden),
                        real=real,
                        layout=site.layout,
                        state=state,
                        groups=groups if isinstance(groups, int) else key.shape[1],
                        capacity=capacity,
                    )
                )
                if self.config.debug:
                    checked = STARKV.check_finite(scored.scores, f"layer {site.index}")
                    scored = scored._replace(scores=checked)
            context.update(site, scored=Inserted(scored.scores, scored.state, real, capacity))
            self.matched += 1


def _real_tokens(context: Context, site: Site) -> Any:
    """[B, L] bool, what the last query sees: padding is what it does not. None without a mask."""
    mask = site.attention.mask
    if mask is None:
        return None
    last = context.proxy(mask)[:, 0, -1, :]
    dtype = fx.value(mask).dtype
    if dtype != torch.bool:
        last = last > torch.finfo(dtype).min / 2
    return last.expand(context.proxy(site.attention.query).shape[0], -1)
