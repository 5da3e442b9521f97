"""A cache in buffers of fixed length. It writes at a slot, as ONNX's TensorScatter does."""

from __future__ import annotations

from typing import Any

import torch

from ...cache.layer import StarKVLayer
from ...cache.state import SharedState


@torch.library.custom_op("starkv_export::write_slots", mutates_args=())
def write_slots(buffer: torch.Tensor, new: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Returns `buffer` [B, G, slots, D] with `new` [B, G, n, D] from slot `slot` [B] int64 on.

    It is only traced: `translations` has its form in ONNX, and a runtime writes in place.
    """
    places = slot[:, None] + torch.arange(new.shape[2], device=slot.device)
    places = places[:, None, :, None].expand_as(new)
    return buffer.scatter(2, places, new)


@write_slots.register_fake
def _(buffer: torch.Tensor, new: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(buffer)


class SlotLayer(StarKVLayer):
    """One layer while a token is decoded into its buffers, [B, G, slots, D] each.

    The caller's mask has a column for each slot and says which slots are read.
    """

    def __init__(
        self, shared: SharedState, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor
    ) -> None:
        super().__init__(shared)
        self.lazy_initialization(keys, values)
        self.hold(keys, values)
        self.slot = slot

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the token into its slot. Returns the full buffers."""
        self._keys = write_slots(self._keys, key_states, self.slot)
        self._values = write_slots(self._values, value_states, self.slot)
        return self._keys, self._values
