"""Inserts the policy's scores into the graph, right after each attention."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import PolicyError, StarKVError
from ..kernels.ops import STARKV
from ..kernels.reference.capacity import every_length, layer_capacity
from ..kernels.reference.quantization import TokenBytes
from ..kernels.reference.star import Layout, State
from ..policies import POLICIES, Scored, ScoreInputs
from . import fx
from .base import Context, GraphPass, without_gradient
from .markers import arguments_of, find_markers
from .masks import visible
from .sites import HIDDEN, Attention, Inserted, Site


class InsertScores(GraphPass):
    """Inserts `scores, state = policy.score(q, k, ...)` after `sdpa(q, k, v)`."""

    def run(self, context: Context) -> None:
        policy = self.config.policy
        weights = self._layer_weights(context)
        for number, site in enumerate(list(context.sites)):
            attention, write = site.attention, site.write
            assert write is not None
            assert site.layout is not None
            marker = write.marker
            with context.graph.inserting_before(attention.node.next):
                query = without_gradient(context.proxy(attention.query))
                key = without_gradient(context.proxy(attention.key))
                log_sum_exp = context.proxy(site.log_sum_exp)
                if marker is None:
                    fresh = STARKV.fresh_state(key, site.layout.current)
                    state = State(*(fresh[i] for i in range(len(State._fields))))
                    seen, counts, turn_start = key.shape[2], None, None
                else:
                    given = arguments_of(marker)
                    state = State(*map(context.proxy, given.state))
                    seen = context.proxy(given.seen)
                    counts = context.proxy(given.counts) if given.has_layout else None
                    turn_start = context.proxy(given.turn_start)
                token_bytes = self._token_bytes(context, site)
                window = self._window(context, site, self.config.scoring_window)
                with every_length():  # proxies have no values: minima stay in the graph
                    capacity = self.config.capacity(seen, token_bytes)
                    if weights is not None:
                        capacity = layer_capacity(key.shape[2], window, capacity, weights, number)
                mask = _mask(context, site, window, policy.observers)
                real = _real_tokens(context, site, mask)
                layout, place, novelty = _stored_tokens(context, site, policy.per_head)
                scored = self._score(
                    context,
                    ScoreInputs(
                        query=self._checked(query, f"layer {site.index}, queries"),
                        key=self._checked(key, f"layer {site.index}, keys"),
                        value=without_gradient(context.proxy(attention.value)),
                        mask=mask,
                        scale=context.proxy(attention.scale),
                        log_sum_exp=without_gradient(log_sum_exp, like=attention.query),
                        hidden=without_gradient(context.proxy(site.hidden)),
                        real=real,
                        layout=layout,
                        counts=counts,
                        state=state,
                        index=place,
                        novelty=novelty,
                        layer=site.index,
                        window=window,
                        capacity=capacity,
                        sharing=_sharing(site),
                        turn_start=turn_start,
                    ),
                )
            inserted = Inserted(
                scores=scored.scores,
                state=State(*scored.state),
                place=place,
                novelty=novelty if scored.novelty is None else scored.novelty,
                real=real,
                capacity=capacity,
                window=window,
            )
            context.update(site, scored=inserted)
            self.matched += 1

    def _score(self, context: Context, inputs: ScoreInputs) -> Scored:
        observer, policy = context.observer, self.config.policy
        if observer is not None:
            # A function has the name that a node needs; any callable may observe.
            inputs.key.tracer.create_proxy(
                "call_function", lambda values: observer(values), (inputs,), {}
            )
        if type(policy) in POLICIES.values():
            return policy.score(inputs)
        try:
            scored = policy.score(inputs)
        except StarKVError:
            raise
        except Exception as error:
            raise PolicyError(
                f"policy={policy.name!r} failed on layer {inputs.layer}: {type(error).__name__}: "
                f"{error}. Its score() runs on proxies of the graph's values: use torch functions, "
                "and do not branch on a value or a shape"
            ) from error
        state = getattr(scored, "state", None)
        if not isinstance(scored, Scored) or not isinstance(state, tuple) or len(state) != 4:
            raise PolicyError(
                f"policy={policy.name!r} returned {type(scored).__name__} for layer "
                f"{inputs.layer}: expected Scored(scores, inputs.state)"
            )
        return scored

    def _layer_weights(self, context: Context) -> tuple[int, ...] | None:
        """How the layers share the budget, if unevenly. Refuses them if that cannot be right."""
        if not self.config.is_uneven:
            return None
        if context.layers not in (0, len(context.sites)):
            reason = (
                f"{len(context.sites)} of {context.layers} layers can be compressed in this graph, "
                "but what each layer keeps depends on all of them; use a policy with one budget "
                "for every layer"
            )
            for site in list(context.sites):
                context.refuse(reason, site.attention.node, site)
        return self.config.layer_weights(len(context.sites)) if context.sites else None

    def _window(self, context: Context, site: Site, wanted: int) -> Any:
        """W, or the number of queries if there are fewer: such a length gets its own graph."""
        if context.every_length:
            return torch.sym_min(wanted, context.proxy(site.attention.query).shape[2])
        queries = fx.shape(site.attention.query)[2]
        return wanted if bool(queries >= wanted) else int(queries)

    def _token_bytes(self, context: Context, site: Site) -> TokenBytes | None:
        """What tokens take in all layers that are compressed, if the budget is in bytes.

        Numbers, or proxies if the number of batch rows is symbolic. If a graph break put layers
        into other graphs, these count as layers like the ones of this graph.
        """
        if self.config.budget_bytes is None:
            return None
        assert site.write is not None
        rows = fx.shape(site.write.key)[0]
        if not isinstance(rows, int):
            rows = context.proxy(site.write.key).shape[0]
        here = map(sum, zip(*(self._row_bytes(other) for other in context.sites), strict=True))
        elsewhere = max(0, context.layers - len(find_markers(context.graph)))
        layers = len(context.sites)
        return TokenBytes(*(rows * (n + -(-n * elsewhere // layers)) for n in here))

    def _row_bytes(self, site: Site) -> TokenBytes:
        """What tokens of one batch row take in this layer's cache."""
        assert site.write is not None
        key, value = fx.value(site.write.key), fx.value(site.write.value)
        return TokenBytes.of(key, value, self.config.nbits)

    def _checked(self, tensor: Any, name: str) -> Any:
        return STARKV.check_finite(tensor, name) if self.config.debug else tensor


def _stored_tokens(context: Context, site: Site, per_head: bool) -> tuple[Layout, Any, Any]:
    """The layout, and from the marker each stored token's place in the stream and its novelty.

    They are by head if each head keeps a set.
    """
    assert site.write is not None
    assert site.layout is not None
    marker = site.write.marker
    given = None if marker is None else arguments_of(marker)
    place = None if given is None else context.proxy(given.place)
    novelty = None if given is None else context.proxy(given.novelty)
    if not per_head:
        return site.layout, place, novelty
    heads = int(fx.shape(site.write.key)[1])
    *described, current = site.layout
    frame, row, column = (_for_heads(tokens, heads) for tokens in described)
    layout = Layout(frame, row, column, current)
    return layout, _for_heads(place, heads), _for_heads(novelty, heads)


def _for_heads(tokens: Any, heads: int) -> Any:
    """Expands [B, L] to [B, G, L]. What is by head already, and None, stay as they are."""
    if tokens is None or len(fx.shape(tokens.node)) == 3:
        return tokens
    return tokens[:, None].expand(-1, heads, -1)


def _mask(context: Context, site: Site, window: Any, observers: int) -> Any:
    """The mask with the leading dimensions that attention would broadcast; None: causal.

    It is also None if the log-sum-exp already accounts for what each query sees, unless the policy
    reads queries before the window.
    """
    attention = site.attention
    if attention.mask_function:
        return _evaluated_mask(context, attention, observers or window)
    mask = visible(context.proxy(attention.mask), attention)
    told = site.log_sum_exp is not None and not observers
    if mask is None and not attention.causal and not told:
        query, key = context.proxy(attention.query), context.proxy(attention.key)
        everything = query.new_ones((1, 1, 1, 1), dtype=torch.bool)
        return everything.expand(1, 1, query.shape[2], key.shape[2])
    return mask


def _evaluated_mask(context: Context, attention: Attention, observers: Any) -> Any:
    """A mask function's values for the queries that score: bool [B, 1, observers, L]."""
    function, *inputs = attention.mask_function
    query, key = context.proxy(attention.query), context.proxy(attention.key)
    batch, places, keys = (
        torch.ones_like(line, dtype=torch.int64).cumsum(0) - 1
        for line in (query[:, 0, 0, 0], query[0, 0, :, 0], key[0, 0, :, 0])
    )
    batch, rows = batch[:, None, None], places[-observers:][:, None]
    arguments = (batch, batch * 0, rows, keys, *map(context.proxy, inputs))
    nodes = tuple(a.node for a in arguments)
    seen = context.proxy(context.graph.call_module(function.target, nodes))  # type: ignore[arg-type]
    return torch.logical_and(seen, batch + rows + keys >= 0)[:, None]


def _sharing(site: Site) -> int:
    """How many heads of the attention's keys are stored as one: several if latents are stored."""
    assert site.write is not None
    return int(fx.shape(site.attention.key)[1] // fx.shape(site.write.key)[1])


def _real_tokens(context: Context, site: Site, mask: Any) -> Any:
    """[B, L] bool, False at padding, which is on the left. None without a mask.

    Real tokens begin with the first one that the last query sees, or with one that sees itself: an
    attention of the model's own may hide real tokens from the last query.
    """
    attention = site.attention
    if attention.mask is None and not attention.mask_function:
        return None
    dtype = torch.bool if attention.mask is None else fx.value(attention.mask).dtype
    query, key = context.proxy(attention.query), context.proxy(attention.key)

    def seen(part: Any) -> Any:
        return part if dtype == torch.bool else part > HIDDEN

    sizes = fx.shape(attention.mask)
    one_for_all_keys = bool(sizes) and fx.same(sizes[-1], 1)
    real = seen(mask[:, 0, -1, :])
    if one_for_all_keys:
        real = real.expand(-1, key.shape[2])
    elif sizes and not context.every_length and _has_row_for_each(attention):
        rows = mask[:, 0]
        itself = rows.diagonal(key.shape[2] - query.shape[2], -2, -1)
        # A row that sees the last key before its time is one of padding, which sees everything.
        honest = seen(itself) & ~seen(rows[:, :, -1])
        real = real | torch.nn.functional.pad(honest, (key.shape[2] - query.shape[2], 0))
    return (real.cumsum(-1) > 0).expand(query.shape[0], -1)


def _has_row_for_each(attention: Attention) -> bool:
    """Whether the mask has a row for each query, and several of them."""
    sizes, queries = fx.shape(attention.mask), fx.shape(attention.query)[2]
    return len(sizes) > 1 and not fx.same(sizes[-2], 1) and bool(sizes[-2] == queries)
