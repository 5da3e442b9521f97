"""Square roots of whole numbers, exactly."""

from __future__ import annotations

import torch


def rounded_root(count: torch.Tensor) -> torch.Tensor:
    """The whole number nearest to the square root of count, int64 in 0 .. 2**24 -> int64.

    TensorRT has no float64, so this uses float32. The root of a whole number never ends in a half.
    So the nearest number is the floor, or one more if count exceeds floor * (floor + 1). The same
    step corrects a float32 root that is one too low at a square.
    """
    floor = count.float().sqrt().long()
    return floor + (count > floor * (floor + 1)).long()
