"""The exported graphs in ONNX Runtime, on torch tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import StarKVError
from .packages import needs

PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider"]}


class Graph:
    """One ONNX file, loaded. It takes and gives torch tensors by the names of its ports."""

    def __init__(self, file: Path, provider: str = "cpu") -> None:
        ort = needs("onnxruntime")
        wanted = PROVIDERS.get(provider)
        if wanted is None:
            raise StarKVError(f"provider {provider!r}: expected one of {', '.join(PROVIDERS)}")
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
                "TensorScatter, bfloat16 provider 'cuda'"
            ) from error
        self.inputs = [port.name for port in self._session.get_inputs()]
        self.outputs = [port.name for port in self._session.get_outputs()]

    def in_place(
        self, feeds: Mapping[str, torch.Tensor], buffers: Mapping[str, str]
    ) -> dict[str, torch.Tensor]:
        """Run it with outputs written over inputs. buffers: the output of each such input.

        Only for graphs that read these inputs no more once the output is written. A buffer that is
        not contiguous is replaced by a copy: go on with what is returned.
        """
        binding = self._session.io_binding()
        inputs = {name: feeds[name].detach().cpu().contiguous() for name in self.inputs}
        for name, tensor in inputs.items():
            binding.bind_input(*_bound(name, tensor))
        written = {buffers[name]: inputs[name] for name in buffers}
        for name in self.outputs:
            if name in written:
                binding.bind_output(*_bound(name, written[name]))
            else:
                binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        return {
            name: written[name] if name in written else torch.from_numpy(value.numpy())
            for name, value in zip(self.outputs, binding.get_outputs(), strict=True)
        }

    def __call__(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run it. Inputs the graph does not have are left out."""
        arrays = {name: _array(feeds[name]) for name in self.inputs}
        results: Sequence[Any] = self._session.run(self.outputs, arrays)
        return {
            name: torch.from_numpy(value) for name, value in zip(self.outputs, results, strict=True)
        }


def _bound(name: str, tensor: torch.Tensor) -> tuple[Any, ...]:
    """Arguments of ONNX Runtime's binding to a tensor's own memory."""
    kind = torch.empty(0, dtype=tensor.dtype).numpy().dtype
    return name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr()


def _array(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()
