"""Runs exported graphs in ONNX Runtime, on torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ...errors import StarKVError
from ...optional import needs
from ..capture.ports import UINT4

ONNX_TYPES = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.bfloat16: 16,
    UINT4: 21,
}
"""Numbers of `onnx.TensorProto`. Graphs run without the package onnx."""

PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider"]}
ENGINES = "tensorrt"


class Runnable(Protocol):
    """A graph that some runtime has loaded."""

    inputs: list[str]
    outputs: list[str]

    def __call__(
        self, feeds: Mapping[str, torch.Tensor], buffers: Mapping[str, str] | None = None
    ) -> dict[str, torch.Tensor]: ...


class Graph:
    """One ONNX file, loaded. It takes and returns torch tensors, with names of ports as keys."""

    def __init__(self, file: Path, provider: str = "cpu") -> None:
        ort = needs("onnxruntime")
        wanted = PROVIDERS.get(provider)
        if wanted is None:
            raise StarKVError(
                f"provider {provider!r}: expected one of {', '.join([*PROVIDERS, ENGINES])}"
            )
        if not set(wanted) <= set(ort.get_available_providers()):
            raise StarKVError(
                f"this onnxruntime has no {wanted[0]}; install onnxruntime-gpu, or use provider "
                "'cpu'"
            )
        if not file.is_file():
            raise StarKVError(f"{file}: there is no such file")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = ort.InferenceSession(str(file), options, providers=wanted)
        except Exception as error:  # its classes are not public, and have no base of their own
            why = str(error).strip().split("\n")[0]
            raise StarKVError(
                f"{file}: ONNX Runtime {ort.__version__} cannot run it with {wanted[0]} ({why}); "
                "export again if a file is missing. A static cache needs a runtime that has "
                "TensorScatter, and bfloat16 needs provider 'cuda'"
            ) from error
        self._types = {port.name: port.type for port in self._session.get_inputs()}
        self.inputs = list(self._types)
        self.outputs = [port.name for port in self._session.get_outputs()]

    def __call__(
        self, feeds: Mapping[str, torch.Tensor], buffers: Mapping[str, str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Runs the graph. It ignores feeds that the graph does not have.

        buffers: inputs that are written in place, and the output that each then holds. The graph
        must not read such an input after that output is written. An input that is not contiguous
        is replaced by a copy, so continue with what is returned.
        """
        binding = self._session.io_binding()
        inputs = {name: feeds[name].detach().cpu().contiguous() for name in self.inputs}
        for name, tensor in inputs.items():
            binding.bind_input(*_bound(name, tensor, self._types[name]))
        written = {output: inputs[name] for name, output in (buffers or {}).items()}
        for name in self.outputs:
            if name in written:
                binding.bind_output(*_bound(name, written[name]))
            else:
                binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        return {
            name: written[name] if name in written else _tensor(value)
            for name, value in zip(self.outputs, binding.get_outputs(), strict=True)
        }


def _bound(name: str, tensor: torch.Tensor, wanted: str = "") -> tuple[Any, ...]:
    """Arguments of ONNX Runtime's binding to a tensor's own memory.

    wanted: the type of the input. PyTorch has numbers of 4 bits as bytes, which hold two each.
    """
    kind, shape = ONNX_TYPES[tensor.dtype], tuple(tensor.shape)
    if wanted == "tensor(uint4)":
        kind, shape = ONNX_TYPES[UINT4], (*shape[:-1], shape[-1] * 2)
    return name, "cpu", 0, kind, shape, tensor.data_ptr()


def _tensor(value: Any) -> torch.Tensor:
    """Converts a result of ONNX Runtime. NumPy has no bfloat16."""
    if value.data_type() == "tensor(bfloat16)":
        return torch.from_dlpack(value._ortvalue)
    return torch.from_numpy(value.numpy())
