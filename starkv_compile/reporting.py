"""What was found, rewritten or left alone and why, and what it saved: for people to read."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SiteReport:
    """One attention of one graph. `reason` is set where it was skipped, `note` where less than
    everything was used."""

    index: int
    form: str
    node: str
    rewritten: bool
    reason: str | None = None
    note: str | None = None

    def __str__(self) -> str:
        state = "rewritten" if self.rewritten else f"skipped: {self.reason}"
        return f"{self.form} at {self.node}: {state}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class GraphReport:
    """One graph: its decoder attentions, and how many others were seen and left.

    decode_sites: attentions of a single query, which only append. encoder_sites: attentions
    without causality or mask, as in vision towers. failure: why the passes gave up, if they did.
    """

    sites: tuple[SiteReport, ...] = ()
    decode_sites: int = 0
    encoder_sites: int = 0
    notes: tuple[str, ...] = ()
    failure: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.rewritten} of {self.found} attentions rewritten"]
        lines += [f"  {site}" for site in self.sites if not site.rewritten or site.note]
        lines += [f"  note: {note}" for note in self.notes]
        if not (self.found or self.decode_sites or self.encoder_sites):
            lines.append("  no attention recognised: looked for scaled_dot_product_attention, its")
            lines.append("  kernels, flex_attention, FlashAttention's ops, and a softmax between")
            lines.append("  two matrix products")
        return "\n".join(lines)

    @property
    def found(self) -> int:
        return len(self.sites)

    @property
    def rewritten(self) -> int:
        return sum(site.rewritten for site in self.sites)


@dataclass(frozen=True)
class LayerStats:
    """One layer's cache: tokens stored of tokens seen; bytes now, and of one token in all rows."""

    stored: int
    seen: int
    nbytes: int
    token_bytes: int

    @property
    def full_nbytes(self) -> int:
        """Bytes, had every token seen been stored."""
        return self.seen * self.token_bytes


@dataclass
class Report:
    """All graphs compiled for a model, and its last compressed cache.

    budget_bytes: the option, where it is given. refusals: uses of the model that were left
    uncompressed, each once, with the way out.
    """

    budget_bytes: int | None = None
    graphs: list[GraphReport] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    layers: list[LayerStats] = field(default_factory=list)
    layout: str = "none"

    @property
    def prompt_graphs(self) -> list[GraphReport]:
        """Graphs that hold decoder attention of a whole prompt."""
        return [graph for graph in self.graphs if graph.found]

    @property
    def nbytes(self) -> int:
        """Bytes of the last cache, all layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers and batch rows of the last cache."""
        return sum(layer.token_bytes for layer in self.layers)

    def __str__(self) -> str:
        lines = []
        for i, graph in enumerate(self.prompt_graphs):
            lines.append(f"prompt graph {i}: {graph}")
        lines += [f"passes gave up: {g.failure}" for g in self.graphs if g.failure]
        lines += [f"left uncompressed: {reason}" for reason in self.refusals]
        if self.layers:
            lines.append(f"vision layout: {_LAYOUTS[self.layout]}")
            lines.append("layer   tokens kept / seen        bytes / uncompressed")
            lines += [
                f"{i:5d}  {s.stored:8d} / {s.seen:<8d}  {s.nbytes:12,d} / {s.full_nbytes:<12,d}"
                for i, s in enumerate(self.layers)
            ]
            now, full = self.nbytes, sum(layer.full_nbytes for layer in self.layers)
            lines.append(
                f"total                        {now:13,d} / {full:<12,d} ({now / full:.1%})"
            )
            if self.budget_bytes is not None:
                lines.append(
                    f"budget {self.budget_bytes:19,d} bytes, of which a token takes "
                    f"{self.token_bytes:,d}"
                )
        if not lines and self.graphs:
            return f"{len(self.graphs)} graphs compiled, none with a cache to compress"
        return "\n".join(lines) or "nothing compiled yet: call the model once"


_LAYOUTS = {
    "grid": "from the processor's grid",
    "positions": "from M-RoPE positions",
    "square": "square guessed: nothing told the frames' shape",
    "text": "no frames",
    "none": "read from the graph, or text only",
}
