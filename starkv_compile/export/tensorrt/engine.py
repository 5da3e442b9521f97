"""Builds TensorRT engines of an exported folder, on a machine with TensorRT and a GPU.

Every function that builds takes the module to build with: `tensorrt`, or its sibling TensorRT-RTX.
The parser and the builder of the latter need no GPU. `make test-trt` checks the graphs with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch

from ...errors import StarKVError
from ...optional import needs_tensorrt
from ..onnx.manifest import Manifest
from .profiles import Profile, lengths, profile, trtexec

UNSOUND = "not self-consistent"
"""Part of a warning about the profile. Such an engine is built, but fails in use."""

STATIC = "; trtexec cannot build a static cache in float32 or with 24,576 slots, but --engine can"
"""What trtexec cannot build from a file alone, see `_decomposable`."""


class EngineError(StarKVError):
    """An engine could not be built or loaded. Exported graphs stay as they are."""


def build_engines(folder: Path, say: Callable[[str], Any] = print) -> list[Path]:
    """Writes an engine next to every graph of an exported folder: all of them or none.

    Args:
        folder: what `export_checkpoint` wrote.
        say: called with the name of each engine before it is built.

    Returns:
        The engines' files.

    Raises:
        EngineError: TensorRT or a GPU is missing, or TensorRT refuses a graph. The message ends
            with the command lines to run elsewhere.
    """
    manifest = Manifest.read(folder)
    ranges = lengths(manifest.max_seq, slots=manifest.shapes.slots)
    profiles = {file: profile(file, ranges) for file in sorted(folder.glob("*.onnx"))}
    made: dict[Path, Path] = {}
    try:
        trt = _tensorrt()
        for file, shapes in profiles.items():
            engine = file.with_suffix(".engine")
            say(engine.name)
            made[engine] = engine.with_name(f".{engine.name}")
            made[engine].write_bytes(serialized(trt, file, shapes))
        for engine, partial in made.items():
            partial.rename(engine)
    except StarKVError as error:
        lines = "\n".join(trtexec(file, shapes) for file, shapes in profiles.items())
        limits = STATIC if manifest.shapes.slots else ""
        raise EngineError(
            f"{folder}: the graphs are written, but the engines are not: {error}. On a machine "
            "with TensorRT 11 and the GPU, run in that folder (TensorRT 10: with --stronglyTyped)"
            f"{limits}:\n{lines}"
        ) from error
    finally:
        for partial in made.values():
            partial.unlink(missing_ok=True)
    return list(made)


def _tensorrt() -> Any:
    """Returns the module. Raises if it or a GPU is missing."""
    trt = needs_tensorrt("tensorrt")
    if not has_gpu():
        raise EngineError("this torch sees no GPU, and an engine is built on a GPU")
    return trt


def has_gpu() -> bool:
    """Whether engines can be built on this machine."""
    return torch.cuda.is_available()


def serialized(trt: Any, file: Path, shapes: Profile) -> Any:
    """Returns the engine's bytes, in a buffer of TensorRT's.

    Scores stay float32 without TF32, because its 10 bits would keep other tokens.

    Raises:
        EngineError: the parser or the builder refuses the graph, or warns of a profile that fails
            in use.
    """
    log = logger(trt)
    log.clear()
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt))
    parser = trt.OnnxParser(network, log)
    built = None
    if parser.parse(_decomposable(file), str(file)):
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        chosen = builder.create_optimization_profile()
        for name, least in shapes.least.items():
            chosen.set_shape(name, least, shapes.usual[name], shapes.most[name])
        config.add_optimization_profile(chosen)
        built = builder.build_serialized_network(network, config)
    unsound = [line for line in log.warnings if UNSOUND in line]
    if built is None or unsound:
        said = "; ".join(unsound or log.errors or ["TensorRT gives no reason"])
        raise EngineError(f"{file.name}: TensorRT {trt.__version__} refuses it: {said}")
    return built


def _decomposable(file: Path) -> bytes:
    """The graph, with a mark that lets TensorRT decompose attention if it has no kernel for it.

    TensorRT-RTX 1.7.1 has no kernel for float32 over lengths that vary, nor for buffers of 24,576
    slots (it has one for 22,528). ONNX has no such attribute, so the file does not contain it.
    """
    model = onnx.load(str(file), load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(onnx.helper.make_attribute("TRT_decomposable", 1))
    return model.SerializeToString()


def _strongly_typed(trt: Any) -> int:
    """The flag for types as in the graph. In TensorRT 11 there is nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


@functools.cache
def logger(trt: Any) -> Any:
    """The only logger for a module, because TensorRT keeps the first one that it gets."""

    class Log(trt.ILogger):
        """Keeps warnings and errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.warnings: list[str] = []
            self.errors: list[str] = []

        def clear(self) -> None:
            self.warnings, self.errors = [], []

        def log(self, severity: Any, message: str) -> None:
            if severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(message)
            elif severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()
