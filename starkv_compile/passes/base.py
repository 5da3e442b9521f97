"""The base class of passes, and the context that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from ..config import StarKVConfig
from ..policies import ScoreInputs
from . import fx
from .functional import FunctionalGraph
from .sites import Arranged, Computed, Refusal, Site

Cache = Literal["caller", "marked", "nobody"]

Observer = Callable[[ScoreInputs], None]


class _Tracer(GraphAppendingTracer):
    """Appends nodes to a graph, and knows which."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        super().__init__(graph)
        self.appended: list[Node] = []

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        self.appended.append(node)
        return node


@dataclass
class Context:
    """The graph that the passes work on, and what they know about it.

    Attributes:
        module: the graph.
        config: the configuration.
        cache: who handles lengths, masks and positions of the shorter cache. "caller": the code
            that runs the graph. "marked": the cache itself; it leaves a marker where it is written,
            and other writes stay as they are. "nobody": everything stays as it is.
        unmarked: why an attention stays as it is whose keys and values have no marker.
        layers: how many layers that cache compresses, in this graph or another. 0: unknown.
        every_length: whether this one graph serves prompts of all lengths, as an exported one
            does. A compiler makes another graph for a length that needs one.
        observer: a function that the graph calls with the `ScoreInputs` of each layer that it
            scores.
        functional: a copy of the graph that the analyses read: nothing in it works in place.
        attentions: nodes of that copy that compute an attention of any kind, rewritten or not.
    """

    module: GraphModule
    config: StarKVConfig
    cache: Cache
    unmarked: str = ""
    layers: int = 0
    every_length: bool = False
    observer: Observer | None = None
    sites: list[Site] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[Refusal] = field(default_factory=list)
    rewritten: list[Site] = field(default_factory=list)
    attentions: set[Node] = field(default_factory=set)
    decode_sites: int = 0
    encoder_sites: int = 0

    def __post_init__(self) -> None:
        self.functional = FunctionalGraph(self.graph)
        self._computed: list[Node] = []
        self._tracer = _Tracer(self.graph)  # proxies of two tracers do not mix

    @property
    def graph(self) -> torch.fx.Graph:
        return self.module.graph

    def refuse(self, reason: str, node: Node, site: Site | None = None) -> None:
        """Notes why `site` stays as it is."""
        index = None if site is None else site.index
        self.refusals.append(Refusal(reason, node.name, index))
        if site is not None:
            self.sites.remove(site)

    def update(self, site: Site, **changes: Any) -> None:
        """Replaces `site` by a copy that knows more."""
        self.sites[self.sites.index(site)] = replace(site, **changes)

    def compute(self, value: Any) -> Any:
        """The node of the graph for a node of the functional graph, or for what a form wants
        computed, at the place where nodes are being inserted."""
        if isinstance(value, Arranged):
            value = value.computed()
        if not isinstance(value, Computed):
            return self.functional.given(value) if isinstance(value, Node) else value
        example, sources = value.example, [self.functional.given(n) for n in value.sources]
        before = len(self._tracer.appended)
        result: Node = value.make(*map(self.proxy, sources)).node
        self._computed += self._tracer.appended[before:]
        result.meta["example_value" if "example_value" in sources[0].meta else "val"] = example
        return result

    def remove_unused(self) -> None:
        """Removes what `compute` has put into the graph for a site that was refused later."""
        for node in reversed(self._computed):
            if not node.users:
                self.graph.erase_node(node)

    def proxy(self, value: Any) -> Any:
        """A node as a proxy, on which calls append nodes to the graph; else `value` itself."""
        if isinstance(value, Node):
            return Proxy(value, self._tracer)
        return value


def without_gradient(value: Any, like: Node | None = None) -> Any:
    """Detaches a proxy, because scores and cached values carry no gradient.

    Inserts nothing if there is no gradient, as under `torch.no_grad`. like: the node to ask, if the
    value's own node has no recorded example.
    """
    if isinstance(value, Proxy) and fx.has_gradient(like or value.node):
        return value.detach()
    return value


class GraphPass:
    """One step of the pipeline. Subclasses implement `run` and add to `matched`."""

    def __init__(self, config: StarKVConfig) -> None:
        self.config = config
        self.matched = 0
        self.before: str | None = None
        self.after: str | None = None

    @property
    def name(self) -> str:
        return type(self).__name__

    def __call__(self, context: Context, dump: bool = False) -> None:
        self.before = str(context.graph) if dump else None
        self.run(context)
        self.after = str(context.graph) if dump else None

    def run(self, context: Context) -> None:
        raise NotImplementedError
