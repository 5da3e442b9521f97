"""What the analysis passes find. Frozen: a later pass adds to a `Site` by replacing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch.fx import Node

from ..kernels.reference.star import Layout, State
from . import fx

HIDDEN = -9984.0
"""An additive mask hides a key with at most this value: -1e4, as bfloat16 rounds it."""


@dataclass(frozen=True)
class Computed:
    """A tensor that no node holds: `make` of some nodes' tensors."""

    make: Callable[..., Any]
    sources: tuple[Node, ...]

    @property
    def example(self) -> Any:
        return self.make(*map(fx.value, self.sources))


@dataclass(frozen=True)
class Arranged:
    """A node's tensor in the order of dimensions that the passes use: permuted, then reshaped.

    order: the permutation. shape, undone: the sizes of the reshape, and of the one that takes it
    back: a number, the place of the dimension that has this size, or None for the size that is
    left. Both are empty if a permutation is enough.
    """

    node: Node
    order: tuple[int, ...] = (0, 1, 2, 3)
    shape: tuple[int | Size | None, ...] = ()
    undone: tuple[int | Size | None, ...] = ()

    @classmethod
    def of_groups(
        cls, node: Node, order: list[int], dims: list[Any], roles: list[Any], size: Any
    ) -> Arranged | None:
        """The arrangement from dimensions that hold `dims`, after `order`, to those of `roles`."""
        if dims == roles:
            return cls(node, tuple(order))
        shape = tuple(_size(role, dims, size) for role in roles)
        undone = tuple(_size(group, roles, size) for group in dims)
        if shape.count(None) > 1 or undone.count(None) > 1:
            return None
        places = (Size(order[s.dim]) if isinstance(s, Size) else s for s in shape)
        return cls(node, tuple(order), tuple(places), undone)

    @property
    def is_plain(self) -> bool:
        return self.order == (0, 1, 2, 3) and not self.shape

    def of(self, tensor: Any) -> Any:
        """[B, H, S, D] of a tensor like the node's."""
        ordered = tensor if _ascend(self.order) else tensor.permute(*self.order)
        return ordered.reshape(*_sizes(self.shape, tensor)) if self.shape else ordered

    def back(self, tensor: Any) -> Any:
        """A tensor like the node's, of [B, H, S, D] with any number of tokens."""
        if self.undone:
            tensor = tensor.reshape(*_sizes(self.undone, tensor))
        if _ascend(self.order):
            return tensor
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        tensor = tensor.permute(*inverse)
        return tensor.contiguous() if fx.value(self.node).is_contiguous() else tensor

    def dim(self, role: int) -> int:
        """Where the node's tensor has a dimension of B, H, S, D; -1 if merged with others."""
        if not self.undone:
            return self.order[role]
        return self.order[self.undone.index(Size(role))] if Size(role) in self.undone else -1

    def computed(self) -> Node | Computed:
        return self.node if self.is_plain else Computed(self.of, (self.node,))


class Size(NamedTuple):
    """The size of a dimension."""

    dim: int


def _size(group: Any, dims: list[Any], size: Any) -> int | Size | None:
    if not group:
        return 1
    if group in dims:
        return Size(dims.index(group))
    number = size(group)
    return number if isinstance(number, int) else None


def _sizes(shape: tuple[int | Size | None, ...], tensor: Any) -> list[Any]:
    return [tensor.shape[s.dim] if isinstance(s, Size) else -1 if s is None else s for s in shape]


def _ascend(order: tuple[int, ...]) -> bool:
    return list(order) == sorted(order)


@dataclass(frozen=True)
class Attention:
    """One attention of a prompt.

    A form may return it with `Computed` and `Arranged` in the place of nodes. `FindAttention` puts
    nodes there.

    Attributes:
        node: computes it.
        form: the name of its form.
        query: [B, H, S, D].
        key: [B, G, L, D], before heads are repeated.
        value: [B, G, L, D], before heads are repeated.
        mask: the mask, or None.
        causal: whether later keys are hidden from a query if there is no mask.
        scale: factor of the products of queries and keys.
        aligned_last: whether causal means that the last query sees the last key, as in
            FlashAttention.
        mask_hides: whether the mask is True where keys are hidden. If not, it is True where they
            are visible.
        mask_function: if the mask is a function of places, the module node and its further inputs.
        log_sum_exp: which of the node's results is the log-sum-exp of its logits [B, H, S].
    """

    node: Node
    form: str
    query: Any
    key: Any
    value: Any
    mask: Any
    causal: bool
    scale: Any
    aligned_last: bool = False
    mask_hides: bool = False
    mask_function: tuple[Node, ...] = ()
    log_sum_exp: int | None = None

    def at(self, node: Node) -> Attention:
        """The same attention, computed by `node`."""
        return replace(self, node=node)


Stored = tuple[tuple[Node, int, Callable[[Any, Any], Any]], ...]
"""Nodes, each with its dimension of tokens, and a function that makes its tensor of keys and values
[B, G, L, D]."""


@dataclass(frozen=True)
class CacheWrite:
    """Where key and value leave the graph to be cached.

    marker: the `starkv.cache_write` node; None if graph outputs are made of them. Key and value are
    those of the attention, or latents from which those are computed, token by token (multi-head
    latent attention). stored: what the graph outputs are made of, as nodes of the functional graph.
    by_token: False if what is computed from latents depends on places or on other tokens.
    """

    key: Node
    value: Node
    marker: Node | None
    stored: Stored = ()
    by_token: bool = True


@dataclass(frozen=True)
class Inserted:
    """Proxies of the values that `InsertScores` put into the graph, and the window that scored.

    place and novelty are as in `kernels.marker.Written`, by head if each head keeps a set.
    """

    scores: Any
    state: State
    place: Any
    novelty: Any
    real: Any
    capacity: Any
    window: Any


@dataclass(frozen=True)
class Site:
    """One decoder attention and all that was found about it. None: not found (yet).

    found: the attention as a form read it in the functional graph.
    """

    index: int
    attention: Attention
    found: Attention
    write: CacheWrite | None = None
    hidden: Node | None = None
    layout: Layout | None = None
    log_sum_exp: Node | None = None
    scored: Inserted | None = None


@dataclass(frozen=True)
class Refusal:
    """Why something stays as it is: the reason in a sentence, and the node that it is about."""

    reason: str
    node: str
    site: int | None = None
