"""One file of weights for all graphs of a folder; a protobuf holds 2 GiB at most."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

FILE = "weights.data"
LEAST = 256
"""Bytes. What is smaller stays in the graph's own file."""

LARGE = 1 << 20
"""Bytes from which on a tensor is not read to find out who it is."""

PAGE = 4096
"""Tensors begin on pages, so that runtimes can map the file into memory."""


class Weights:
    """Writes tensors to `weights.data` of a folder, each one once, one at a time in memory.

    The prompt's graph and the decoding one have the same weights: a model's size on disk, not two.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[Hashable, tuple[int, int]] = {}
        self._held: list[Any] = []  # an address tells who a tensor is only as long as it lives

    def move_out(self, model: ir.Model) -> None:
        """Put a reference to the file in the place of every large constant of the model."""
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes <= LEAST:
                continue
            offset, length = self._write(tensor)
            value.const_value = ir.ExternalTensor(
                FILE,
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape),
                name=name,
                base_dir=self.folder,
            )

    def _write(self, tensor: Any) -> tuple[int, int]:
        """(offset, length) in the file."""
        who = self._identity(tensor)
        if who not in self._places:
            with (self.folder / FILE).open("ab") as file:
                file.write(b"\0" * (-file.tell() % PAGE))
                start = file.tell()
                in_order(tensor.numpy()).tofile(file)
                self._places[who] = start, file.tell() - start
        return self._places[who]

    def _identity(self, tensor: Any) -> Hashable:
        """Of a weight its place in memory, as reading them all would take long; else the contents.

        A linear layer's matrix comes turned, by a view on the parameter that is the same each time.
        """
        if tensor.nbytes < LARGE:
            return hashlib.sha256(tensor.tobytes()).digest(), tensor.dtype, tuple(tensor.shape)
        values = tensor.numpy()
        self._held.append(values)
        return values.ctypes.data, tensor.dtype, values.shape, values.strides


def in_order(values: np.ndarray) -> np.ndarray:
    """A turned matrix the way it is written, by torch, which takes a fifth of NumPy's time."""
    if values.flags.c_contiguous:
        return values
    same_bits = torch.from_numpy(values.view(f"i{values.itemsize}"))  # torch has not all its types
    return same_bits.contiguous().numpy().view(values.dtype)
