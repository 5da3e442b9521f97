"""Reports for people: which attentions were rewritten or skipped, why, and the bytes saved."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["GraphReport", "LayerStats", "Report", "SiteReport", "readable_bytes"]


@dataclass(frozen=True)
class SiteReport:
    """One attention of one graph.

    Attributes:
        index: its number in the graph.
        form: how the graph computes it, such as "sdpa".
        node: its node in the graph.
        rewritten: whether scores and a compaction were inserted.
        reason: why it was skipped, with the way out; None if it was rewritten.
        note: which input of the scores was missing; None if there were all.
    """

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
    """What the passes found in one graph.

    Attributes:
        sites: the decoder attentions of a prompt, a `SiteReport` each.
        decode_sites: number of attentions of a single query, which only append.
        encoder_sites: number of attentions without causality or mask, as in vision towers.
        notes: remarks about the whole graph.
        failure: the error that stopped the passes, or None.
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
            lines.append("  no attention found. The passes know scaled_dot_product_attention, its")
            lines.append("  kernels, flex_attention, FlashAttention's ops, and a softmax between")
            lines.append("  two matrix products")
        return "\n".join(lines)

    @property
    def found(self) -> int:
        """Number of decoder attentions of a prompt."""
        return len(self.sites)

    @property
    def rewritten(self) -> int:
        """Number of those that were rewritten."""
        return sum(site.rewritten for site in self.sites)


@dataclass(frozen=True)
class LayerStats:
    """The cache of one layer in numbers.

    Attributes:
        stored: tokens that the layer stores.
        seen: tokens that the layer has seen.
        nbytes: bytes of the storages that hold its keys and values.
        token_bytes: bytes of one token in all batch rows.
        left: how many of the tokens seen have left the session, with their frame or its turn.
        coded: how many of the tokens stored are in codes of `nbits`.
        nbits: 16 if all tokens are stored in the model's precision.
    """

    stored: int
    seen: int
    nbytes: int
    token_bytes: int
    left: int = 0
    coded: int = 0
    nbits: int = 16

    @property
    def in_session(self) -> int:
        """Tokens that the session still has: budgets that are a share count these."""
        return self.seen - self.left

    @property
    def full_nbytes(self) -> int:
        """Bytes that the layer would take if it stored every token of the session."""
        return self.in_session * self.token_bytes


@dataclass
class Report:
    """All graphs compiled for a model, and the numbers of its last compressed cache.

    `print(report)` shows it as a table.

    Attributes:
        budget_bytes: the option, or None.
        graphs: one `GraphReport` for each graph.
        refusals: why uses of the model stayed uncompressed, with the way out; each reason once.
        without_buffers: why compressed caches grew in place of filling the buffers of
            `decode_tokens`; each reason once.
        layers: one `LayerStats` for each compressed layer of the last cache.
        layout: where rows and columns of the visual tokens come from: "grid", "positions",
            "square", "text" or "none".
    """

    budget_bytes: int | None = None
    graphs: list[GraphReport] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    without_buffers: list[str] = field(default_factory=list)
    layers: list[LayerStats] = field(default_factory=list)
    layout: str = "none"

    @property
    def prompt_graphs(self) -> list[GraphReport]:
        """Graphs that contain the decoder attention of a prompt."""
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
        for text, times in Counter(map(str, self.prompt_graphs)).items():
            first, *others = text.splitlines()
            alike = f" ({times} graphs alike)" if times > 1 else ""
            lines += [f"prompt graph: {first}{alike}", *others]
        lines += [f"the passes failed: {g.failure}" for g in self.graphs if g.failure]
        lines += [f"left uncompressed: {reason}" for reason in self.refusals]
        lines += [f"decoded without buffers: {reason}" for reason in self.without_buffers]
        if self.layers:
            lines.append(f"vision layout: {_LAYOUTS[self.layout]}")
            lines.append("layer   tokens kept / seen        bytes / uncompressed")
            lines += [
                f"{i:5d}  {x.stored:8d} / {x.in_session:<8d}  "
                f"{x.nbytes:12,d} / {x.full_nbytes:<12,d}"
                for i, x in enumerate(self.layers)
            ]
            now, full = self.nbytes, sum(layer.full_nbytes for layer in self.layers)
            lines.append(
                f"total                        {now:13,d} / {full:<12,d} ({now / full:.1%}: "
                f"{readable_bytes(now)} of {readable_bytes(full)})"
            )
            left = max(layer.left for layer in self.layers)
            coded = [layer for layer in self.layers if layer.coded]
            if coded:
                fewest = min(layer.stored - layer.coded for layer in coded)
                lines.append(f"{coded[0].nbits} bits: all kept tokens but the newest {fewest}")
            if left:
                lines.append(f"{left:,d} more tokens have left the session, with their frames")
            if self.budget_bytes is not None:
                lines.append(
                    f"budget {self.budget_bytes:19,d} bytes; a token takes {self.token_bytes:,d}"
                )
        if not lines and self.graphs:
            return f"{len(self.graphs)} graphs compiled; none of them has a cache to compress"
        return "\n".join(lines) or "nothing compiled yet: call the model once"


def readable_bytes(number: int) -> str:
    """Such as "5.5 MiB"; below 1 KiB the exact number."""
    if number < 1024:
        return f"{number} bytes"
    for power, unit in ((3, "GiB"), (2, "MiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:,.{power - 1}f} {unit}"
    return f"{number / 1024:,.1f} KiB"


_LAYOUTS = {
    "grid": "from the processor's grid",
    "positions": "from M-RoPE positions",
    "square": "frames taken as squares, because their shape is unknown",
    "text": "no frames",
    "none": "read from the graph, or text only",
}
