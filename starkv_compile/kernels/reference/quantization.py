"""Quantizes keys and values of tokens to 8 or 4 bits, and back.

A row is what one head stores of one token, D numbers. It is moved by the centre of its layer and
head, rotated, and rounded to equal steps between its least and its greatest number. So:

* A row depends on no other row. Choosing again among stored rows is a gather of codes, and a row
  that is not finite spoils no other one.
* Channels that are far from zero in every token, as in models that do not normalise keys, are in
  the centre. Other far channels are spread over all others by the rotation, a Hadamard matrix.

`benchmarks/low_bits.py` compares this form with others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

Tensor = torch.Tensor

BITS = (8, 4)


class Quantized(NamedTuple):
    """Rows in few bits.

    codes: [B, G, C, D] uint8 with 8 bits, [B, G, C, ceil(D / 2)] with 4, where a byte holds a
    number of the row's first half in its low bits, and one of the second half in its high bits.
    ranges: [B, G, C, 2] in 16 bits, the least number and the step. centre: [B, G, 1, D] float32,
    the same for all rows that a layer ever quantizes.
    """

    codes: Tensor
    ranges: Tensor
    centre: Tensor

    @property
    def tokens(self) -> int:
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self)


def coded_width(dim: int, nbits: int) -> int:
    """Bytes of the codes of one row of `dim` numbers."""
    return -(-dim * nbits // 8)


def row_bytes(dim: int, nbits: int) -> int:
    """Bytes of the codes and the range of one row of `dim` numbers."""
    return coded_width(dim, nbits) + 4


RANGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Of ranges. Those of tokens in float16 and in bfloat16, joined, are float32."""


def range_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype, of 16 bits, of the ranges of rows of `dtype`."""
    return torch.float16 if dtype == torch.float16 else torch.bfloat16


class TokenBytes(NamedTuple):
    """Bytes of tokens in one layer or in several.

    full: of one token in the model's precision. coded: of one in few bits. shared: of what all
    tokens in few bits have in common, their centre.
    """

    full: int
    coded: int
    shared: int

    @classmethod
    def of(cls, key: Tensor, value: Tensor, nbits: int) -> TokenBytes:
        """For one batch row of a layer that stores rows like `key` and `value` [B, G, L, D].

        The batch and the length may be symbols, as they are in a graph.
        """
        heads = [(t.shape[1], t.shape[3], t.element_size()) for t in (key, value)]
        return cls(
            sum(groups * dim * size for groups, dim, size in heads),
            sum(groups * row_bytes(dim, nbits) for groups, dim, _ in heads),
            sum(groups * dim * 4 for groups, dim, _ in heads),
        )


def centre_of(rows: Tensor) -> Tensor:
    """The mean [B, G, 1, D] float32 of rows [B, G, C, D], without those that are not finite."""
    rows = rows.float()
    good = rows.isfinite().all(-1, keepdim=True)
    return rows.where(good, 0.0).sum(2, keepdim=True) / good.sum(2, keepdim=True).clamp(min=1)


def quantize(rows: Tensor, centre: Tensor, nbits: int) -> Quantized:
    """`Quantized` rows [B, G, C, D]. See `codes_and_ranges`."""
    return Quantized(*codes_and_ranges(rows, centre, nbits), centre)


def codes_and_ranges(rows: Tensor, centre: Tensor, nbits: int) -> tuple[Tensor, Tensor]:
    """Codes and ranges of rows [B, G, C, D] of any floating-point dtype, as `Quantized` has them.

    Each number ends within half a step of where it was, plus the rounding of the range to 16 bits:
    float16 for rows of float16, else bfloat16. A row with NaN or infinity becomes NaN.
    """
    turned = turn(rows.float() - centre)
    ranges = ranges_of(torch.stack(turned.aminmax(dim=-1), -1), nbits, rows.dtype)
    low, step = ranges.float().split(1, -1)
    # A row of equal numbers has no step. Every code is its least number.
    codes = torch.where(step > 0, (turned - low) / step, 0.0).nan_to_num(nan=0.0)
    codes = codes.round().clamp(0, 2**nbits - 1).to(torch.uint8)
    return codes if nbits == 8 else _packed(codes), ranges


def ranges_of(ends: Tensor, nbits: int, dtype: torch.dtype) -> Tensor:
    """What `Quantized` stores of the least and the greatest number [..., 2] of rows of `dtype`."""
    low, high = ends.unbind(-1)
    ranges = torch.stack([low, (high - low) / (2**nbits - 1)], -1)
    return ranges.to(range_dtype(dtype))


def dequantize(codes: Tensor, ranges: Tensor, centre: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows [B, G, C, D] that `quantize` made these of, rounded."""
    dim = centre.shape[-1]
    numbers = unpacked(codes, dim)
    low, step = ranges.float().split(1, -1)
    return (turn(low + numbers * step) + centre).to(dtype)


def unpacked(codes: Tensor, dim: int) -> Tensor:
    """The codes [B, G, C, dim] uint8, one a byte, of codes as `Quantized` has them."""
    if codes.shape[-1] == dim:
        return codes
    return torch.cat([codes & 15, codes >> 4], -1)[..., :dim]


def turn(rows: Tensor) -> Tensor:
    """Rotates rows [..., D]: by a Hadamard matrix, in blocks of the largest power of two in D.

    The rotation is its own inverse, so products of two turned rows are those of the rows.
    """
    dim = rows.shape[-1]
    size = dim & -dim
    blocks = rows.unflatten(-1, (dim // size, size))
    return (blocks @ _hadamard(size, rows)).flatten(-2)


def _hadamard(size: int, like: Tensor) -> Tensor:
    """Orthogonal and symmetric [size, size]; size is a power of two, at most 2^16.

    A number is negative where its row and its column have an odd number of bits in common.
    """
    place = torch.arange(size, device=like.device)
    odd = place[:, None] & place
    for half in (8, 4, 2, 1):
        odd = odd ^ odd >> half
    return (1 - 2 * (odd & 1)).to(like.dtype) * size**-0.5


def _packed(codes: Tensor) -> Tensor:
    half = (codes.shape[-1] + 1) // 2
    first, second = codes[..., :half], codes[..., half:]
    second = torch.nn.functional.pad(second, (0, half - second.shape[-1]))
    return first | second << 4
