"""Put the policy's scores into the graph, right after each attention."""

from __future__ import annotations

from ..kernels.ops import STARKV
from ..policies import POLICIES, ScoreInputs
from . import fx
from .base import Context, GraphPass

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
                scored = policy.score(
                    ScoreInputs(
                        query=context.proxy(attention.query),
                        key=key,
                        mask=context.proxy(attention.mask),
                        scale=attention.scale,
                        hidden=context.proxy(site.hidden),
                        layout=site.layout,
                        state=state,
                        groups=fx.shape(attention.key)[1],
                        capacity=capacity,
                    )
                )
                if self.config.debug:
                    checked = STARKV.check_finite(scored.scores, f"layer {site.index}")
                    scored = scored._replace(scores=checked)
            context.update(site, scored=(scored, capacity))
            self.matched += 1
