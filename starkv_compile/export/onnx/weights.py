"""Writes one file of weights for all graphs of a folder. A protobuf holds at most 2 GiB."""

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
"""Bytes. Smaller tensors stay in the graph's own file."""

LARGE = 1 << 20
"""Bytes. Larger tensors are identified by their address, and their contents are not read."""

PAGE = 4096
"""Tensors begin on pages, so that runtimes can map the file into memory."""


class Weights:
    """Writes tensors to `weights.data` of a folder, each one once, with one at a time in memory.

    The prompt's graph and the decoding graph share their weights, so the folder holds them once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[Hashable, tuple[int, int]] = {}
        self._held: list[Any] = []  # an address identifies a tensor only as long as it lives

    def move_out(self, model: ir.Model) -> None:
        """Replaces every large constant of the model by a reference to the file."""
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
        """For a large tensor its place in memory, because reading takes long; else its contents.

        A linear layer's matrix comes transposed, as a view of the parameter, the same each time.
        """
        if tensor.nbytes < LARGE:
            return hashlib.sha256(tensor.tobytes()).digest(), tensor.dtype, tuple(tensor.shape)
        values = tensor.numpy()
        self._held.append(values)
        return values.ctypes.data, tensor.dtype, values.shape, values.strides


def in_order(values: np.ndarray) -> np.ndarray:
    """A transposed matrix in the order of the file. torch takes a fifth of NumPy's time."""
    if values.flags.c_contiguous:
        return values
    same_bits = torch.from_numpy(values.view(f"i{values.itemsize}"))  # torch has not all its types
    return same_bits.contiguous().numpy().view(values.dtype)
