"""Masks of attention as ops of starkv read them."""

from __future__ import annotations

from typing import Any

import torch

from . import fx
from .sites import Attention


def visible(mask: Any, attention: Attention) -> Any:
    """A proxy of a mask, True where keys are visible or added to logits, with four dimensions.

    None stays None.
    """
    if mask is None:
        return None
    if attention.mask_hides:
        mask = torch.logical_not(mask)
    missing = 4 - len(fx.shape(attention.mask))
    return mask[(None,) * missing] if missing else mask
