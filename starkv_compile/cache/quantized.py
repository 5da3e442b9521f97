"""The tokens of a layer that are stored in few bits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.ops import STARKV
from ..kernels.reference.quantization import Quantized

Tensor = torch.Tensor


class QuantizedTokens(NamedTuple):
    """Keys and values of the C oldest tokens stored.

    place: [B, C] int64, or [B, G, C] if each head keeps a set: their places in the stream.
    """

    key: Quantized
    value: Quantized
    place: Tensor

    @property
    def tokens(self) -> int:
        return self.key.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the storages of codes, ranges and centres."""
        return self.key.nbytes + self.value.nbytes

    def rows(self, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, C, D] that the codes stand for, each of its dtype."""
        return (
            STARKV.dequantize(*self.key, dtypes[0]),
            STARKV.dequantize(*self.value, dtypes[1]),
        )

    def first(self, tokens: int) -> QuantizedTokens:
        """The oldest `tokens` of these."""
        key, value = (
            t._replace(codes=t.codes[:, :, :tokens], ranges=t.ranges[:, :, :tokens])
            for t in self[:2]
        )
        return QuantizedTokens(key, value, self.place[..., :tokens])

    def select_rows(self, rows: Tensor) -> QuantizedTokens:
        """Keeps, repeats or reorders batch rows."""
        key, value = (Quantized(*(part[rows] for part in t)) for t in self[:2])
        return QuantizedTokens(key, value, self.place[rows])


def quantize_tokens(
    key: Tensor, value: Tensor, place: Tensor, nbits: int, earlier: QuantizedTokens | None
) -> QuantizedTokens:
    """Quantizes keys and values [B, G, C, D] at `place`, in ascending order.

    earlier: tokens that have codes already. They keep them, so no token is rounded twice, and all
    others are rounded around the same centre.
    """
    if earlier is None:
        centres = STARKV.centre(key), STARKV.centre(value)
    else:
        centres = earlier.key.centre, earlier.value.centre
    new = [_quantized(*pair, nbits) for pair in zip((key, value), centres, strict=True)]
    if earlier is None or not earlier.tokens:
        return QuantizedTokens(new[0], new[1], place)
    known = earlier.place
    if known.dim() < place.dim():  # heads that choose for themselves now had one set before
        known = known[:, None]
    known = known.expand(*place.shape[:-1], -1)
    found = torch.searchsorted(known.contiguous(), place.contiguous())
    found = found.clamp(max=earlier.tokens - 1)
    stays = known.gather(-1, found) == place
    return QuantizedTokens(
        _kept(new[0], earlier.key, found, stays), _kept(new[1], earlier.value, found, stays), place
    )


def _quantized(rows: Tensor, centre: Tensor, nbits: int) -> Quantized:
    codes, ranges = STARKV.quantize(rows, centre, nbits)
    return Quantized(codes, ranges, centre)


def _kept(new: Quantized, before: Quantized, found: Tensor, stays: Tensor) -> Quantized:
    """`new` where a token does not stay, else codes and ranges that it had before."""
    groups = new.codes.shape[1]
    found, stays = (
        t if t.dim() == 3 else t[:, None].expand(-1, groups, -1) for t in (found, stays)
    )

    def of(now: Tensor, old: Tensor) -> Tensor:
        index = found[..., None].expand(*found.shape, old.shape[-1])
        return torch.where(stays[..., None], old.gather(2, index), now)

    return Quantized(of(new.codes, before.codes), of(new.ranges, before.ranges), new.centre)
