"""Inputs and outputs of the exported graphs: one list that tracing, files and runner go by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Dims = tuple[int | str, ...]


@dataclass(frozen=True)
class Port:
    """One tensor that goes in or comes out. dims: a number, or the name of a length that varies."""

    name: str
    dims: Dims
    dtype: torch.dtype

    def shape(self, sizes: dict[str, int]) -> list[int]:
        return [sizes[dim] if isinstance(dim, str) else dim for dim in self.dims]

    def described(self) -> dict[str, Any]:
        """For `export.json`."""
        kind = str(self.dtype).removeprefix("torch.")
        return {"name": self.name, "shape": list(self.dims), "dtype": kind}


@dataclass(frozen=True)
class Layer:
    """Shapes of what one layer stores: heads of keys and values, and their widths."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Shapes:
    """What the ports of a model follow from.

    position_rows: 3 where positions are M-RoPE's, 0 where they are one number a token. deepstack:
    how many further features of an image token are added to early layers. images: whether the
    model takes any. slots: tokens that each layer's buffers have room for, 0 where its keys and
    values grow.
    """

    layers: tuple[Layer, ...]
    hidden: int
    vocabulary: int
    dtype: torch.dtype
    position_rows: int = 0
    images: bool = False
    deepstack: int = 0
    slots: int = 0


def tokens_in(shapes: Shapes, new: int | str) -> list[Port]:
    """`new` tokens a row, and what is known of all tokens seen, these included."""
    rows = (shapes.position_rows,) if shapes.position_rows else ()
    return [
        Port("input_ids", ("batch", new), torch.int64),
        Port("position_ids", (*rows, "batch", new), torch.int64),
        Port("attention_mask", ("batch", "seen"), torch.int64),
    ]


def images_in(shapes: Shapes) -> list[Port]:
    """Features of the image tokens, in their places; what stands at other tokens is not read."""
    if not shapes.images:
        return []
    wide: Dims = ("batch", "new", shapes.hidden)
    return [
        Port("image_mask", ("batch", "new"), torch.bool),
        Port("image_embeds", wide, shapes.dtype),
        *(Port(f"deepstack.{i}", wide, shapes.dtype) for i in range(shapes.deepstack)),
    ]


def layout_in() -> list[Port]:
    """Of every token seen, `cache.SharedState.layout`; then how many a share of the budget counts.

    `budgeted` is read for its length alone: a length can be a symbol of the graph, a value cannot.
    """
    lines = [Port(name, ("batch", "seen"), torch.int64) for name in ("frame", "row", "column")]
    current = Port("current", ("batch", "on_frame"), torch.int64)
    counted = Port("counted", ("batch", "seen"), torch.bool)
    return [*lines, current, counted, Port("budgeted", ("budgeted",), torch.bool)]


def stored(shapes: Shapes, prefix: str, length: int | str) -> list[list[Port]]:
    """Keys and values of each layer: of `length` tokens, a number where they are slots."""
    return [
        [
            Port(f"{prefix}.{i}.key", ("batch", n.heads, length, n.key_dim), shapes.dtype),
            Port(f"{prefix}.{i}.value", ("batch", n.heads, length, n.value_dim), shapes.dtype),
        ]
        for i, n in enumerate(shapes.layers)
    ]


def state(shapes: Shapes, prefix: str, length: str) -> list[list[Port]]:
    """Place in the stream of all that each layer stores, how new it was, and the scoring state."""
    return [
        [
            Port(f"{prefix}.{i}.kept", ("batch", length), torch.int64),
            Port(f"{prefix}.{i}.novelty", ("batch", length), torch.float32),
            Port(f"{prefix}.{i}.mi", ("batch", n.heads), torch.float32),
            Port(f"{prefix}.{i}.mi_steps", ("batch",), torch.int64),
            Port(f"{prefix}.{i}.pattern", ("batch", n.heads, "on_frame"), torch.float32),
            Port(f"{prefix}.{i}.pattern_count", ("batch",), torch.int64),
        ]
        for i, n in enumerate(shapes.layers)
    ]


def joined(*parts: list[list[Port]]) -> list[Port]:
    """Layer by layer, the ports of all parts."""
    return [port for layer in zip(*parts, strict=True) for ports in layer for port in ports]


def prefill_ports(shapes: Shapes) -> tuple[list[Port], list[Port]]:
    """(inputs, outputs) of the prompt's graph.

    Of buffers, it reads `past`, what their filled slots hold, and writes into `buffer`: nothing is
    both read and written in place, in whatever order a runtime computes.
    """
    inputs = [*tokens_in(shapes, "new"), *images_in(shapes), *layout_in()]
    past = joined(stored(shapes, "past", "stored"), state(shapes, "past", "stored"))
    written = joined(stored(shapes, "buffer", shapes.slots)) if shapes.slots else []
    present = joined(
        stored(shapes, "present", shapes.slots or "kept"), state(shapes, "present", "kept")
    )
    return [*inputs, *past, *written], [logits_out(shapes), *present]


def decode_ports(shapes: Shapes) -> tuple[list[Port], list[Port]]:
    """(inputs, outputs) of the graph of one further token; its state is the prompt's.

    Of buffers, `attention_mask` tells which slots are read, and `slot` where the token is written.
    """
    past = joined(stored(shapes, "past", shapes.slots or "stored"))
    present = joined(stored(shapes, "present", shapes.slots or "stored_and_new"))
    tokens = tokens_in(shapes, 1)
    if shapes.slots:
        tokens[-1:] = [
            Port("attention_mask", ("batch", shapes.slots), torch.int64),
            Port("slot", ("batch",), torch.int64),
        ]
    return [*tokens, *past], [logits_out(shapes), *present]


def logits_out(shapes: Shapes) -> Port:
    return Port("logits", ("batch", shapes.vocabulary), torch.float32)
