"""Runs a TensorRT engine, with the same call as a graph in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import StarKVError
from .engine import EngineError, logger

DEVICE = "cuda"
"""Engines work on the memory of this device."""

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}


class EngineGraph:
    """One engine, loaded, with the attributes and the call of `graphs.Graph`.

    Args:
        file: what `build_engines` or trtexec wrote.
        trt: the module to run it with.

    Raises:
        EngineError: there is no engine, or it is for another GPU or version.
    """

    def __init__(self, file: Path, trt: Any) -> None:
        if not file.is_file():
            raise EngineError(
                f"{file}: there is no such engine; export with --engine, or build it with trtexec"
            )
        self.file, self.device = file, torch.device(DEVICE)
        self._log = logger(trt)
        self._log.clear()
        self._engine = trt.Runtime(self._log).deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            said = "; ".join(self._log.errors) or "TensorRT gives no reason"
            raise EngineError(
                f"{file}: TensorRT {trt.__version__} cannot load it ({said}); an engine runs only "
                "on the kind of GPU and the version that built it; build it again here"
            )
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        taken = {name for name in names if self._mode(name) == trt.TensorIOMode.INPUT}
        self.inputs = [name for name in names if name in taken]
        self.outputs = [name for name in names if name not in taken]
        # Outputs that are inputs written in place: TensorRT wants one address for both.
        aliases = {name: self._engine.get_aliased_input_tensor(name) for name in self.outputs}
        self._aliases = {name: given for name, given in aliases.items() if given}

    def __call__(
        self, feeds: Mapping[str, torch.Tensor], buffers: Mapping[str, str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Runs the engine. It ignores feeds that the engine does not have.

        What it writes in place is a copy on its device, never the caller's tensor. Continue with
        what is returned, for any `buffers`.
        """
        held = {}  # keeps what the engine reads and writes alive until it has run
        written = set(self._aliases.values())
        for name in self.inputs:
            given = feeds[name].detach().contiguous()
            tensor = given.to(self.device, self._dtype(name), copy=name in written)
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise StarKVError(
                    f"{self.file}: {name} of shape {list(tensor.shape)} is not in the engine's "
                    "profile; export again with a larger --max-seq"
                )
            held[name] = self._bind(name, tensor)
        results = {}
        for name in self.outputs:
            if name in self._aliases:
                results[name] = held[self._aliases[name]]
            else:
                shape = tuple(self._context.get_tensor_shape(name))
                results[name] = torch.empty(shape, dtype=self._dtype(name), device=self.device)
            held[name] = self._bind(name, results[name])
        if not self._context.execute_async_v3(self._stream()):
            raise StarKVError(
                f"{self.file}: TensorRT did not run it: {'; '.join(self._log.errors)}"
            )
        return {name: value.cpu() for name, value in results.items()}

    def _bind(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Gives the engine the address of a tensor. An empty tensor has none, but it wants one."""
        empty = tensor.numel() == 0
        memory = torch.zeros(1, dtype=tensor.dtype, device=self.device) if empty else tensor
        self._context.set_tensor_address(name, memory.data_ptr())
        return memory

    def _dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._engine.get_tensor_dtype(name).name]

    def _mode(self, name: str) -> Any:
        return self._engine.get_tensor_mode(name)

    def _stream(self) -> int:
        is_gpu = self.device.type == "cuda"
        return torch.cuda.current_stream(self.device).cuda_stream if is_gpu else 0
