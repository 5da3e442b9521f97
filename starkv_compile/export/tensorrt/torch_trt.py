"""Compiles exported programs with torch-tensorrt. PyTorch runs what it has no converters for."""

from __future__ import annotations

from typing import Any

from torch.export.passes import move_to_device_pass

from ...optional import TORCH_TENSORRT_SETTINGS, needs_tensorrt
from .programs import Program


def compile_program(program: Program, device: str = "cuda", **settings: Any) -> Any:
    """Returns a module for `program.run`, compiled by `torch_tensorrt.dynamo.compile`.

    Args:
        program: a result of `export_programs`.
        device: the program moves there with its weights, as torch-tensorrt needs.
        settings: torch-tensorrt's own settings, such as `assume_dynamic_shape_support=True`.

    Raises:
        MissingPackage: torch-tensorrt is not installed, or its libraries or a GPU are missing.
    """
    trt = needs_tensorrt("torch_tensorrt")
    moved = move_to_device_pass(program.exported, device)
    settings = {**TORCH_TENSORRT_SETTINGS, **settings}
    return trt.dynamo.compile(moved, arg_inputs=_profile(trt, program), **settings)


def _profile(trt: Any, program: Program) -> list[Any]:
    """Least, usual and largest shape of each input."""
    least, usual, most = (
        {name: sizes[i] for name, sizes in program.ranges.items()} for i in range(3)
    )
    return [
        trt.Input(
            min_shape=port.shape(least),
            opt_shape=port.shape(usual),
            max_shape=port.shape(most),
            dtype=port.dtype,
        )
        for port in program.inputs
    ]
