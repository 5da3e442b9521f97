"""The exported graphs in ONNX Runtime, on torch tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import StarKVError
from .packages import needs, needs_tensorrt

PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider"]}
ENGINES = "tensorrt"


class Runnable(Protocol):
    """A graph, loaded in some runtime."""

    inputs: list[str]
    outputs: list[str]

    def __call__(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...


def open_graph(file: Path, provider: str) -> Runnable:
    """The graph in ONNX Runtime; or, for "tensorrt", the engine beside it."""
    if provider != ENGINES:
        return Graph(file, provider)
    from .engine_graph import EngineGraph

    return EngineGraph(file.with_suffix(".engine"), needs_tensorrt("tensorrt"))


class Graph:
    """One ONNX file, loaded. It takes and gives torch tensors by the names of its ports."""

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
        self._session = ort.InferenceSession(str(file), options, providers=wanted)
        self.inputs = [port.name for port in self._session.get_inputs()]
        self.outputs = [port.name for port in self._session.get_outputs()]

    def __call__(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run it. Inputs the graph does not have are left out."""
        arrays = {name: _array(feeds[name]) for name in self.inputs}
        results: Sequence[Any] = self._session.run(self.outputs, arrays)
        return {
            name: torch.from_numpy(value) for name, value in zip(self.outputs, results, strict=True)
        }


def _array(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()
