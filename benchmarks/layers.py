"""Lists the measured layer shapes, and makes inputs for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Rows and columns of a screenshot's visual tokens on Qwen-VL's grid (28 pixels per token).
SCREENS = {"1080p": (39, 69), "1440p": (51, 91), "4k": (77, 137)}
TEXT = 40  # tokens before the first screen, and the same number after the last one


@dataclass(frozen=True)
class Layer:
    """Describes a model's attention layer: query heads, KV heads, head size, hidden size."""

    name: str
    heads: int
    groups: int
    dim: int
    hidden: int


LAYERS = {
    "qwen2.5-vl-7b": Layer("qwen2.5-vl-7b", 28, 4, 128, 3584),
    "qwen3-vl-8b": Layer("qwen3-vl-8b", 32, 8, 128, 4096),
}


@dataclass(frozen=True)
class Size:
    """Describes a prompt of `frames` screenshots, then the instruction, in one layer."""

    layer: Layer
    screen: str
    frames: int
    window: int
    budget: float
    dtype: torch.dtype

    @property
    def frame_tokens(self) -> int:
        rows, columns = SCREENS[self.screen]
        return rows * columns

    @property
    def length(self) -> int:
        return self.frames * self.frame_tokens + 2 * TEXT

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Returns [start, end) of each screenshot."""
        starts = [TEXT + i * self.frame_tokens for i in range(self.frames)]
        return [(start, start + self.frame_tokens) for start in starts]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.layer.name} {self.frames}x{self.screen} window {self.window} "
            f"budget {self.budget:.0%} {dtype}"
        )


@dataclass(frozen=True)
class Inputs:
    """Holds query [1, H, L, D], key and value [1, G, L, D], hidden [1, L, E], and the layout."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    hidden: torch.Tensor
    layout: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(size: Size, device: str, seed: int = 0) -> Inputs:
    """Makes random inputs whose attention has a sink and a heavy tail, as real attention has."""
    generator = torch.Generator().manual_seed(seed)
    layer, length = size.layer, size.length
    query = torch.randn(1, layer.heads, length, layer.dim, generator=generator)
    key = torch.randn(1, layer.groups, length, layer.dim, generator=generator)
    value = torch.randn(1, layer.groups, length, layer.dim, generator=generator)
    hidden = torch.randn(1, length, layer.hidden, generator=generator)
    wanted = query[:, :: layer.heads // layer.groups, -1:]
    key += wanted * torch.randn(1, 1, length, 1, generator=generator) * 0.3
    key[:, :, 0] += 0.6 * wanted[:, :, 0]
    rows, columns = SCREENS[size.screen]
    frame = torch.full((1, length), -1)
    row, column = (
        torch.zeros(1, length, dtype=torch.int64),
        torch.zeros(1, length, dtype=torch.int64),
    )
    place = torch.arange(rows * columns)
    for i, (start, end) in enumerate(size.spans):
        frame[0, start:end] = i
        row[0, start:end], column[0, start:end] = place // columns, place % columns
    current = torch.arange(*size.spans[-1])[None]
    tensors = [t.to(device, size.dtype) for t in (query, key, value, hidden)]
    return Inputs(*tensors, tuple(t.to(device) for t in (frame, row, column, current)))
