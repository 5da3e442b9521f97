"""Attention within the windows of a vision tower (Qwen2.5-VL's), as one batch of windows.

transformers attends window by window, in a loop over their lengths. A graph for all image sizes
cannot have such a loop. Windows at an image's edges are smaller. Here all windows are padded to the
full size, and a mask hides the padding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from ..capture.ports import Port

FORM = "starkv_windows"
"""Name of `_attend` in transformers' table of attentions, while a tower is exported."""


class Windows:
    """Where the patches of each window are, and which of the tower's attentions use windows.

    places, real [windows, W] and home [patches] are as `window_inputs` returns them.
    """

    def __init__(
        self, tower: Any, places: torch.Tensor, real: torch.Tensor, home: torch.Tensor
    ) -> None:
        self.places, self.real, self.home = places, real, home
        everywhere = set(tower.fullatt_block_indexes)
        self.inside = {b.attn for i, b in enumerate(tower.blocks) if i not in everywhere}

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """[1, H, patches, D] each, the result as well."""
        q, k, v = (t[0][:, self.places].transpose(0, 1) for t in (query, key, value))
        # A row for each query: ONNX Runtime's Attention takes no other mask.
        mask = self.real[:, None, None].expand(-1, -1, self.places.shape[1], -1)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return found.transpose(0, 1).flatten(1, 2)[None, :, self.home]


def has_windows(tower: Any) -> bool:
    return hasattr(tower, "fullatt_block_indexes") and hasattr(tower, "window_size")


def window_ports(tower: Any) -> list[Port]:
    """Ports for what depends on the image's size alone, without positions: see `window_inputs`."""
    widest = _widest(tower)
    return [
        Port("window_index", ("merged",), torch.int64),
        Port("window_places", ("windows", widest), torch.int64),
        Port("window_real", ("windows", widest), torch.bool),
        Port("window_home", ("patches",), torch.int64),
    ]


def window_inputs(tower: Any, grid: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs for one image's grid [1, 3], in patches.

    window_index [merged]: the merged patches, window by window. window_places [windows, W]: in that
    order, the patches of each window. window_real: False for padding. window_home [patches]: the
    place of each patch among all W of all windows.
    """
    from transformers.vision_utils import get_vision_window_index

    index, bounds = get_vision_window_index(
        grid,
        spatial_merge_size=tower.spatial_merge_size,
        window_size=tower.window_size,
        patch_size=tower.patch_size,
    )
    bounds = bounds.long()
    patches, widest = int(bounds[-1]), _widest(tower)
    place = torch.arange(widest)
    real = place < bounds.diff()[:, None]
    return {
        "window_index": index,
        "window_places": (bounds[:-1, None] + place).clamp(max=patches - 1),
        "window_real": real,
        "window_home": real.flatten().nonzero()[:, 0],
    }


@contextlib.contextmanager
def as_batch(tower: Any) -> Iterator[None]:
    """Inside the block, the tower's attention is `_attend`, which reads the call's `windows`."""
    if not has_windows(tower):
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = tower.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[FORM] = _attend
    tower.config._attn_implementation = FORM
    try:
        yield
    finally:
        tower.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[FORM]


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    windows: Windows,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Has transformers' signature: [1, H, patches, D] each. The result is [1, patches, H, D]."""
    if module in windows.inside:
        found = windows.attend(query, key, value, scaling)
    else:
        found = F.scaled_dot_product_attention(query, key, value, scale=scaling)
    return found.transpose(1, 2), None


def _widest(tower: Any) -> int:
    """Patches of a full window."""
    side = tower.window_size // tower.spatial_merge_size // tower.patch_size
    return int((side * tower.spatial_merge_size) ** 2)
