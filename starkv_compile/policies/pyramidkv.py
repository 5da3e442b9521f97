"""PyramidKV: SnapKV with more tokens in lower layers."""

from __future__ import annotations

from typing import ClassVar

from .snapkv import SnapKV

BETA = 20


class PyramidKV(SnapKV):
    """PyramidKV (Cai et al., arXiv 2406.02069): scores of `snapkv`, budgets that fall linearly.

    Beyond its window the last layer keeps a 20th of the mean, the first what is left of twice the
    mean. As published the step from layer to layer is rounded down, so that the total may exceed
    the budget; here it is the budget's, to the token. Where the first layer has no more tokens to
    keep, the last keeps as many more, as published.
    """

    name: ClassVar[str] = "pyramidkv"

    uneven: ClassVar[bool] = True

    def layer_weights(self, layers: int) -> tuple[int, ...]:
        if layers == 1:
            return (1,)
        fall = 2 * BETA - 2
        return tuple((2 * BETA - 1) * (layers - 1) - fall * layer for layer in range(layers))
