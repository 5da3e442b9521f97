"""ONNX files of captured graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import lazy_names

if TYPE_CHECKING:
    from .graphs import Graph
    from .onnx_graph import OPSET
    from .package import write_decode
    from .visual import export_visual
    from .weights import Weights

# These import onnx, which the package itself does not need.
__getattr__ = lazy_names(
    __name__,
    {
        "Graph": "graphs",
        "OPSET": "onnx_graph",
        "Weights": "weights",
        "export_visual": "visual",
        "write_decode": "package",
    },
)

__all__ = ["OPSET", "Graph", "Weights", "export_visual", "write_decode"]
