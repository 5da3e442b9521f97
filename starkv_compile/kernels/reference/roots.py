"""Square roots of whole numbers, exactly."""

from __future__ import annotations

import torch


def rounded_root(count: torch.Tensor) -> torch.Tensor:
    """The whole number nearest to the square root of count, int64 in 0 .. 2**24 -> int64.

    No float64: TensorRT has none. The root of a whole number never ends in a half, so the nearest
    one is the floor, or one more where count exceeds floor * (floor + 1). A float32 root that is
    one too low at a square is mended by the same step.
    """
    floor = count.float().sqrt().long()
    return floor + (count > floor * (floor + 1)).long()
