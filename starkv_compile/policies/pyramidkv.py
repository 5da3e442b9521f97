"""PyramidKV: SnapKV with more tokens in lower layers."""

from __future__ import annotations

from typing import ClassVar

from .snapkv import SnapKV

BETA = 20


class PyramidKV(SnapKV):
    """PyramidKV (Cai et al., arXiv 2406.02069): scores of `snapkv`, budgets that fall linearly.

    Beyond its window, the last layer keeps a 20th of the mean, and the first layer keeps the rest
    of twice the mean. If the first layer has too few tokens for that, the last one keeps as many
    more, as in the paper. The paper rounds each step between layers down, so that its total may
    exceed the budget. Here the total is that of the budget, to the token.
    """

    name: ClassVar[str] = "pyramidkv"

    uneven: ClassVar[bool] = True

    def layer_weights(self, layers: int) -> tuple[int, ...]:
        if layers == 1:
            return (1,)
        fall = 2 * BETA - 2
        return tuple((2 * BETA - 1) * (layers - 1) - fall * layer for layer in range(layers))
