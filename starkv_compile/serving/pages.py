"""Reads keys and values of a request out of the blocks of vLLM's cache."""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor

DIGIT = 64
"""Base of the digits that `_probed` writes. Each number is exact in every dtype."""


class Pages:
    """Where a block of one layer's cache holds which number.

    On GPUs a cache is a view [blocks, heads, tokens, 2 D], keys first. The CPU backend packs keys
    for its vector units, in a form that depends on the machine. So there it is found out: the
    backend itself writes known numbers into a cache of two blocks.

    Args:
        attention: the layer's attention, which can write a cache.
        layer: the layer.
        cache: its cache, [blocks, ...].
        block: tokens in a block.
    """

    def __init__(self, attention: Any, layer: Any, cache: Tensor, block: int) -> None:
        self.block = block
        self.heads, self.dim = attention.num_kv_heads, attention.head_size
        self._order = None
        if cache.device.type == "cpu":
            self._order = [self._probed(attention, layer, cache, side) for side in (0, 1)]

    def read(self, cache: Tensor, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [G, length, D] of the first `length` tokens in `blocks`."""
        pages = cache[blocks[: -(-length // self.block)].long()]
        if self._order is None:
            found = [pages[..., : self.dim], pages[..., self.dim :]]
        else:
            flat = pages.reshape(len(pages), -1)
            shape = (len(pages), self.heads, self.block, self.dim)
            found = [flat[:, order].view(shape) for order in self._order]
        key, value = (t.transpose(0, 1).flatten(1, 2)[:, :length] for t in found)
        return key, value

    def _probed(self, attention: Any, layer: Any, cache: Tensor, side: int) -> Tensor:
        """[G * block * D]: where in a block each number of keys (0) or values (1) lies."""
        size = self.heads * self.block * self.dim
        # Number n of the block, as [tokens, heads, D]: the order in which backends take tokens.
        numbers = torch.arange(size).view(self.heads, self.block, self.dim).transpose(0, 1)
        probe = torch.zeros_like(cache[:2])
        slots = torch.arange(self.block, 2 * self.block)  # of the second block
        found = torch.zeros(probe[1].numel(), dtype=torch.int64)
        unit = 1
        while unit <= size:
            digits = (numbers // unit % DIGIT + 1).to(cache.dtype).contiguous()
            pair = [torch.zeros_like(digits), torch.zeros_like(digits)]
            pair[side] = digits
            probe.zero_()
            attention.do_kv_cache_update(layer, *pair, probe, slots)
            flat = probe[1].reshape(-1)
            is_ours = flat != 0
            found += torch.where(is_ours, flat.long() - 1, 0) * unit
            unit *= DIGIT
        where = is_ours.nonzero()[:, 0]
        assert len(where) == size, "every number of a block lies in one place"
        order = torch.empty(size, dtype=torch.int64)
        order[found[where]] = where
        return order
