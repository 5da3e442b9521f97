"""Operations that onnxscript translates wrongly, wastefully or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20 as op
from onnxscript.values import Opset

from .slots import write_slots

NEWEST = 24  # TensorScatter came with it


def sort_stable(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """aten.sort.stable: ONNX's TopK over everything gives ties to the lowest index."""
    length = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
    return op.TopK(values, length, axis=dim, largest=descending, sorted=True)


def conv3d(
    values: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> Any:
    """aten.conv3d: onnxscript's gives one without a bias (Qwen2-VL's) zeros of a wrong shape.

    In float32 where it is bfloat16, which Conv has in later opsets only.
    """
    wide = values.dtype == ir.DataType.BFLOAT16
    given = [values, weight, bias]
    if wide:
        given = [v if v is None else op.Cast(v, to=ir.DataType.FLOAT) for v in given]
    found = op.Conv(
        *given, strides=list(stride), pads=[*padding, *padding], dilations=list(dilation),
        group=groups,
    )  # fmt: skip
    return op.Cast(found, to=ir.DataType.BFLOAT16) if wide else found


def tensor_scatter(buffer: Any, new: Any, slot: Any) -> Any:
    """`slots.write_slots`."""
    return Opset("", NEWEST).TensorScatter(buffer, new, slot, axis=-2)


TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.sort.stable: sort_stable,
    torch.ops.aten.conv3d.default: conv3d,
    write_slots._opoverload: tensor_scatter,
}
