"""Translations of operations that onnxscript translates wrongly, wastefully or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20 as op
from onnxscript.values import Opset

from ..capture.codes import dequantize_linear
from ..capture.slots import write_slots

HAS_BLOCKS = 21  # of DequantizeLinear: a step for every row; and numbers of 4 bits
HAS_ATTENTION = 23
NEWEST = 24  # TensorScatter came with it


def sort_stable(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """aten.sort.stable as ONNX's TopK over all elements, which gives ties to the lowest index."""
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
    """aten.conv3d. Without a bias (Qwen2-VL), onnxscript's own form adds zeros of a wrong shape.

    It computes bfloat16 in float32, because Conv takes bfloat16 in later opsets only.
    """
    wide = values.dtype == ir.DataType.BFLOAT16
    given = [values, weight, bias]
    if wide:
        given = [v if v is None else op.Cast(v, to=ir.DataType.FLOAT) for v in given]
    found = op.Conv(
        *given,
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )
    return op.Cast(found, to=ir.DataType.BFLOAT16) if wide else found


def tensor_scatter(buffer: Any, new: Any, slot: Any) -> Any:
    """`slots.write_slots`."""
    return Opset("", NEWEST).TensorScatter(buffer, new, slot, axis=-2)


def dequantize(codes: Any, step: Any, nbits: int) -> Any:
    """`codes.dequantize_linear`. A block is a row. With 4 bits, see `onnx_graph.name_lengths`."""
    width = codes.shape[-1] * 8 // nbits
    return Opset("", HAS_BLOCKS).DequantizeLinear(codes, step, axis=3, block_size=width)


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """aten.scaled_dot_product_attention by groups, for opsets without Attention.

    query [B, H, S, D], key and value [B, G, L, D]: the queries of a group's heads are rows of one
    product, [B, G, H/G * S, D]. onnxscript's form repeats, scales and transposes the keys, which
    copies the full cache three times for every token. dropout_p is 0 in inference.
    """
    heads, width = query.shape[1], query.shape[3]
    groups = key.shape[1]
    factor = op.CastLike(op.Constant(value_float=width**-0.5 if scale is None else scale), query)
    rows = op.Reshape(op.Mul(query, factor), op.Constant(value_ints=[0, groups, -1, width]))
    scores = op.MatMul(rows, op.Transpose(key, perm=[0, 1, 3, 2]))
    if is_causal:
        square = op.Concat(op.Shape(query, start=2, end=3), op.Shape(key, start=2, end=3), axis=0)
        attn_mask = op.Trilu(op.Expand(op.Constant(value=ir.tensor([True])), square), upper=0)
    if is_causal or attn_mask is not None:
        of_heads = op.Concat(op.Shape(query, end=3), op.Shape(key, start=2, end=3), axis=0)
        masked = _masked(op.Reshape(scores, of_heads), attn_mask, query.dtype)
        scores = op.Reshape(masked, op.Shape(scores))
    found = op.MatMul(op.Softmax(scores, axis=-1), value)
    return op.Reshape(found, op.Constant(value_ints=[0, heads, -1, value.shape[3]]))


def _masked(scores: Any, mask: Any, dtype: ir.DataType) -> Any:
    """Puts the least finite number at hidden keys, because a row of padding may see no key."""
    if mask.dtype == dtype:
        return op.Add(scores, mask)
    return op.Where(mask, scores, op.Constant(value=ir.tensor(dtype.min, dtype=dtype)))


ALWAYS: dict[Any, Any] = {
    torch.ops.aten.sort.stable: sort_stable,
    torch.ops.aten.conv3d.default: conv3d,
    write_slots._opoverload: tensor_scatter,
    dequantize_linear._opoverload: dequantize,
}


def translations(opset: int) -> dict[Any, Any]:
    """The translations that replace onnxscript's at this opset."""
    if opset >= HAS_ATTENTION:
        return ALWAYS
    return {**ALWAYS, torch.ops.aten.scaled_dot_product_attention.default: attention}
