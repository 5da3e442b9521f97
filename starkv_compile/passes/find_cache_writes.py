"""Find where the keys and values of each attention leave the graph. Analysis only."""

from __future__ import annotations

from . import fx
from .base import Context, GraphPass
from .sites import CacheWrite, Site

WAY_OUT = (
    "pass a starkv_compile.StarKVCache as past_key_values, or compile the model with "
    "starkv_compile.compile(model)"
)


class FindCacheWrites(GraphPass):
    """A marker that `StarKVCache` left, or a key and a value that are graph outputs."""

    def run(self, context: Context) -> None:
        markers = [n for n in context.graph.nodes if fx.is_op(n, fx.CACHE_WRITE)]
        by_key = {marker.args[0]: marker for marker in markers}
        returned = set(fx.outputs(context.graph))
        for site in list(context.sites):
            attention = site.attention
            marker = by_key.get(attention.key)
            if marker is not None and marker.args[1] is attention.value:
                write = CacheWrite(attention.key, attention.value, marker)
            elif attention.key in returned and attention.value in returned:
                write = CacheWrite(attention.key, attention.value, None)
                if self._refuse_foreign_cache(context, site):
                    continue
            else:
                context.refuse(
                    "its keys and values are not cached (use_cache=False, or a sliding window)",
                    attention.node,
                    site,
                )
                continue
            context.update(site, write=write)
            self.matched += 1

    def _refuse_foreign_cache(self, context: Context, site: Site) -> bool:
        """Whether a cache that does not know its logical length would be read wrongly later."""
        if context.owns_cache:
            return False
        attention = site.attention
        if not bool(fx.shape(attention.query)[2] == fx.shape(attention.key)[2]):
            reason = f"the cache already holds tokens and cannot be shortened rightly; {WAY_OUT}"
        elif attention.mask is not None:
            reason = f"a masked prompt (padding) cannot be shortened rightly here; {WAY_OUT}"
        else:
            return False
        context.refuse(reason, attention.node, site)
        return True
