"""Export: writes a decoder that compresses its cache as ONNX graphs, and runs them.

    starkv export CHECKPOINT --budget 0.2 --max-seq 16384 -o DIR

`torch.export` captures the model. The graph passes rewrite the captured graph. The bodies of
starkv's ops replace the ops, and `torch.onnx` writes the result. See docs/guides/export.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .onnx.manifest import Manifest
    from .onnx.package import ExportOptions, export_checkpoint, export_model
    from .runner import OnnxSession, load_model

# `starkv --help` and a plain import need neither torch nor onnx.
__getattr__ = lazy_names(
    __name__,
    {
        "ExportOptions": "onnx.package",
        "Manifest": "onnx.manifest",
        "OnnxSession": "runner",
        "export_checkpoint": "onnx.package",
        "export_model": "onnx.package",
        "load_model": "runner",
    },
)

__all__ = [
    "ExportOptions",
    "Manifest",
    "OnnxSession",
    "export_checkpoint",
    "export_model",
    "load_model",
]
