"""Inputs and outputs of the exported graphs: one list for tracing, files and the runner.

The exported modules take a dict of tensors with names of input ports as keys, and return one with
names of output ports as keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ...kernels.reference.quantization import coded_width, range_dtype

T = TypeVar("T")
Dims = tuple[int | str, ...]

UINT4: torch.dtype = torch.uint4  # type: ignore[attr-defined]
CODES = {8: torch.uint8, 4: UINT4}
"""The dtype of codes in a file, by their bits."""


@dataclass(frozen=True)
class Port:
    """One tensor that goes in or comes out. dims: a number, or the name of a length that varies.

    dtype: of the tensor in a file. PyTorch holds `UINT4` as bytes, two numbers in each, as ONNX
    does.
    """

    name: str
    dims: Dims
    dtype: torch.dtype

    def shape(self, sizes: dict[str, int]) -> list[int]:
        return [sizes[dim] if isinstance(dim, str) else dim for dim in self.dims]

    def zeros(self, sizes: dict[str, int]) -> torch.Tensor:
        """A tensor of these sizes, as PyTorch holds it."""
        *rows, last = self.shape(sizes)
        if self.dtype == UINT4:
            return torch.zeros(*rows, last // 2, dtype=torch.uint8)
        return torch.zeros(*rows, last, dtype=self.dtype)

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
    """The facts about a model that decide its ports.

    Attributes:
        layers: shapes of what each layer stores.
        hidden: hidden size.
        vocabulary: number of logits.
        dtype: type of weights and cache.
        position_rows: 3 for M-RoPE positions, 0 if a token has one number.
        images: whether the model takes images.
        deepstack: how many further features of an image token are added to early layers.
        slots: tokens that fit in each layer's buffers; 0 if keys and values grow.
        nbits: bits of each number of the older tokens stored; 16 for the model's precision.
    """

    layers: tuple[Layer, ...]
    hidden: int
    vocabulary: int
    dtype: torch.dtype
    position_rows: int = 0
    images: bool = False
    deepstack: int = 0
    slots: int = 0
    nbits: int = 16


@dataclass(frozen=True)
class GraphPorts:
    """Ports of one graph: `inputs`, the logits, and what it returns of each layer by field."""

    inputs: list[Port]
    logits: Port
    layers: list[dict[str, Port]]

    @property
    def outputs(self) -> list[Port]:
        return [self.logits, *_every(self.layers)]


def of_layer(prefix: str, layer: int, fields: Mapping[str, T]) -> dict[str, T]:
    """One layer's values, with names of ports as keys."""
    return {f"{prefix}.{layer}.{field}": value for field, value in fields.items()}


def fields_of(prefix: str, layer: int, values: Mapping[str, T]) -> dict[str, T]:
    """The inverse of `of_layer`: one layer's values, with fields as keys."""
    start = f"{prefix}.{layer}."
    return {
        name.removeprefix(start): value for name, value in values.items() if name.startswith(start)
    }


def deepstack(number: int) -> list[str]:
    """Names of further features of the image tokens, which are added to early layers."""
    return [f"deepstack.{i}" for i in range(number)]


def tokens_in(shapes: Shapes, new: int | str, masked: int | str = "seen") -> list[Port]:
    """Ports for `new` tokens in each row, and a mask of all tokens seen (these too) or of slots."""
    rows = (shapes.position_rows,) if shapes.position_rows else ()
    return [
        Port("input_ids", ("batch", new), torch.int64),
        Port("position_ids", (*rows, "batch", new), torch.int64),
        Port("attention_mask", ("batch", masked), torch.int64),
    ]


def images_in(shapes: Shapes) -> list[Port]:
    """Ports for features of the image tokens, in their places. Other places are not read."""
    if not shapes.images:
        return []
    wide: Dims = ("batch", "new", shapes.hidden)
    return [
        Port("image_mask", ("batch", "new"), torch.bool),
        Port("image_embeds", wide, shapes.dtype),
        *(Port(name, wide, shapes.dtype) for name in deepstack(shapes.deepstack)),
    ]


def layout_in() -> list[Port]:
    """Ports for `cache.SharedState.layout` of every token seen, and for what a share counts.

    Only the length of `budgeted` is read: a length can be a symbol of the graph, a value cannot.
    """
    lines = [Port(name, ("batch", "seen"), torch.int64) for name in ("frame", "row", "column")]
    current = Port("current", ("batch", "on_frame"), torch.int64)
    counted = Port("counted", ("batch", "seen"), torch.bool)
    turn_start = Port("turn_start", (1,), torch.int64)
    return [*lines, current, counted, turn_start, Port("budgeted", ("budgeted",), torch.bool)]


def pair(
    shapes: Shapes, prefix: str, number: int, layer: Layer, length: int | str
) -> dict[str, Port]:
    """A layer's keys and values by field, for `length` tokens; a number if they are slots."""
    dims: dict[str, Dims] = {
        "key": ("batch", layer.heads, length, layer.key_dim),
        "value": ("batch", layer.heads, length, layer.value_dim),
    }
    return {field: Port(f"{prefix}.{number}.{field}", dims[field], shapes.dtype) for field in dims}


def codes(shapes: Shapes, number: int, layer: Layer) -> dict[str, Port]:
    """A layer's oldest tokens in few bits, by field; see `kernels.reference.quantization`."""
    rows: Dims = ("batch", layer.heads, "coded")
    one_centre: Dims = ("batch", layer.heads, 1)
    found: dict[str, tuple[Dims, torch.dtype]] = {}
    for side, dim in (("key", layer.key_dim), ("value", layer.value_dim)):
        width = coded_width(dim, shapes.nbits) * 8 // shapes.nbits
        found |= {
            f"{side}_codes": ((*rows, width), CODES[shapes.nbits]),
            f"{side}_ranges": ((*rows, 2), range_dtype(shapes.dtype)),
            f"{side}_centre": ((*one_centre, dim), torch.float32),
        }
    return {field: Port(f"coded.{number}.{field}", *found[field]) for field in found}


def state(prefix: str, number: int, layer: Layer, length: str) -> dict[str, Port]:
    """A layer's places in the stream, novelties and scoring state, by field."""
    kinds: dict[str, tuple[Dims, torch.dtype]] = {
        "kept": (("batch", length), torch.int64),
        "novelty": (("batch", length), torch.float32),
        "mi": (("batch", layer.heads), torch.float32),
        "mi_steps": (("batch",), torch.int64),
        "pattern": (("batch", layer.heads, "on_frame"), torch.float32),
        "pattern_count": (("batch",), torch.int64),
    }
    return {field: Port(f"{prefix}.{number}.{field}", *kinds[field]) for field in kinds}


def _every(layers: Iterable[dict[str, Port]]) -> list[Port]:
    return [port for layer in layers for port in layer.values()]


def prefill_ports(shapes: Shapes) -> GraphPorts:
    """Ports of the prompt's graph.

    With buffers, it reads `past`, the contents of their filled slots, and writes into `buffer`. So
    no tensor is both read and written in place, in whatever order a runtime computes.
    """
    slots = shapes.slots
    past, buffers, present = [], [], []
    for i, layer in enumerate(shapes.layers):
        past.append(pair(shapes, "past", i, layer, "stored") | state("past", i, layer, "stored"))
        present.append(
            pair(shapes, "present", i, layer, slots or "kept") | state("present", i, layer, "kept")
        )
        if slots:
            buffers.append(pair(shapes, "buffer", i, layer, slots))
    inputs = [*tokens_in(shapes, "new"), *images_in(shapes), *layout_in()]
    return GraphPorts([*inputs, *_every(past), *_every(buffers)], logits_out(shapes), present)


def decode_ports(shapes: Shapes) -> GraphPorts:
    """Ports of the graph of one more token. The scoring state stays that of the prompt.

    With buffers, `attention_mask` says which slots are read, and `slot` where the token is written.
    With few bits, `coded` comes before `past`, and only `past` grows.
    """
    slots = shapes.slots
    past, present, coded = [], [], []
    for i, layer in enumerate(shapes.layers):
        past.append(pair(shapes, "past", i, layer, slots or "stored"))
        present.append(pair(shapes, "present", i, layer, slots or "stored_and_new"))
        if shapes.nbits < 16:
            coded.append(codes(shapes, i, layer))
    inputs = tokens_in(shapes, 1, slots or "seen")
    if slots:
        inputs.append(Port("slot", ("batch",), torch.int64))
    return GraphPorts([*inputs, *_every(coded), *_every(past)], logits_out(shapes), present)


def logits_out(shapes: Shapes) -> Port:
    return Port("logits", ("batch", shapes.vocabulary), torch.float32)
