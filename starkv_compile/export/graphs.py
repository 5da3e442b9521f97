"""Opens an exported graph in the runtime that a provider names."""

from __future__ import annotations

from pathlib import Path

from ..optional import needs_tensorrt
from .onnx.graphs import ENGINES, Graph, Runnable


def open_graph(file: Path, provider: str) -> Runnable:
    """Opens the graph in ONNX Runtime; or, for "tensorrt", the engine next to it."""
    if provider != ENGINES:
        return Graph(file, provider)
    from .tensorrt.engine_graph import EngineGraph

    return EngineGraph(file.with_suffix(".engine"), needs_tensorrt("tensorrt"))
