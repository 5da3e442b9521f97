"""The attention of a decoded token over codes, with ONNX's DequantizeLinear.

ONNX holds two 4-bit numbers in a byte, next to each other in a row. The byte of a code holds a
number of the row's first half, and one of its second half. So the graph reads every row in another
order. Queries and results, which are small, are brought into that order and out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ...kernels.reference.quantization import Quantized, turn
from ...kernels.reference.quantized_attention import added_by

Tensor = torch.Tensor


@torch.library.custom_op("starkv_export::dequantize_linear", mutates_args=())
def dequantize_linear(codes: Tensor, step: Tensor, nbits: int) -> Tensor:
    """Codes times `step` [B, G, C, 1]: [B, G, C, D] float32. `translations` has its form in ONNX.

    With 4 bits, the two numbers of a byte are next to each other, and D is even.
    """
    numbers = codes if nbits == 8 else torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return numbers * step


@dequantize_linear.register_fake
def _(codes: Tensor, step: Tensor, nbits: int) -> Tensor:
    return step.new_empty(*codes.shape[:3], codes.shape[3] * 8 // nbits)


def bodies(nbits: int) -> dict[str, Callable[..., Any]]:
    """Functions that replace the ops of starkv that read codes of `nbits`."""

    def dequantize(codes: Tensor, ranges: Tensor, centre: Tensor, dtype: torch.dtype) -> Tensor:
        low, step = ranges.float().split(1, -1)
        rows = _in_halves(dequantize_linear(codes, step, nbits), centre.shape[-1], nbits)
        return (turn(rows + low) + centre).to(dtype)

    def quantized_attention(query: Tensor, *arguments: Any) -> Tensor:
        """`reference.quantized_attention` with one softmax, which may have no tokens in codes.

        arguments: those of the op.
        """
        *codes, newer_key, newer_value, mask, scale = arguments
        key, value = Quantized(*codes[:3]), Quantized(*codes[3:])
        batch, heads, queries, _ = query.shape
        groups = newer_key.shape[1]
        rows = query.float().reshape(batch, groups, heads // groups * queries, -1) * scale
        turned = turn(rows)
        low, step = key.ranges.float().split(1, -1)
        older = _in_pairs(turned, nbits) @ dequantize_linear(key.codes, step, nbits).mT
        older = older + turned.sum(-1, keepdim=True) * low.mT + rows @ key.centre.mT
        logits = torch.cat([older, rows @ newer_key.float().mT], -1)
        if mask is not None:
            logits = logits + added_by(mask, groups, heads, queries)
        weights = logits.softmax(-1)
        older, newer = weights[..., : key.tokens], weights[..., key.tokens :]
        low, step = value.ranges.float().split(1, -1)
        found = older @ dequantize_linear(value.codes, step, nbits)
        found = _in_halves(found, value.centre.shape[-1], nbits) + older @ low
        found = turn(found) + older.sum(-1, keepdim=True) * value.centre
        found = found + newer @ newer_value.float()
        return found.reshape(batch, heads, queries, -1).to(query.dtype)

    return {"dequantize": dequantize, "quantized_attention": quantized_attention}


def _in_pairs(rows: Tensor, nbits: int) -> Tensor:
    """Rows [..., D] in the order of `dequantize_linear`."""
    if nbits == 8:
        return rows
    return F.pad(rows, (0, rows.shape[-1] % 2)).unflatten(-1, (2, -1)).mT.flatten(-2)


def _in_halves(rows: Tensor, dim: int, nbits: int) -> Tensor:
    """The inverse of `_in_pairs`, for rows of `dim` numbers."""
    return rows if nbits == 8 else rows.unflatten(-1, (-1, 2)).mT.flatten(-2)[..., :dim]
