"""95 % intervals of measured shares: Wilson's interval, and a bootstrap over prompts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
Z = 1.96  # 95 %


class Interval(NamedTuple):
    """Holds an estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def wilson(right: float, of: float) -> tuple[float, float]:
    """Returns Wilson's 95 % interval (low, high) of the share `right / of` of independent trials.

    For trials of different weights w, `of` is their effective number, (sum of w)^2 / sum of w^2
    (Kish, Survey Sampling, 1965), and `right` the weighted share of it.

    Raises:
        ValueError: `of` is less than 1.
    """
    if of < 1:
        raise ValueError(f"{right} of {of}: a share needs at least one trial")
    share = right / of
    centre = share + Z * Z / (2 * of)
    half = Z * (share * (1 - share) / of + Z * Z / (4 * of * of)) ** 0.5
    low, high = (centre - half) / (1 + Z * Z / of), (centre + half) / (1 + Z * Z / of)
    return max(0.0, low), min(1.0, high)  # rounding may leave -1e-17


class Bootstrap:
    """Draws resamples of P prompts once, so that all comparisons use the same resamples.

    A resample takes a prompt with all its questions. Those share screens and a cache, so they are
    not independent.
    """

    def __init__(self, prompts: int, resamples: int = RESAMPLES, seed: int = 0) -> None:
        drawn = np.random.default_rng(seed).multinomial(
            prompts, np.full(prompts, 1 / prompts), size=resamples
        )
        self._drawn = drawn.astype(np.float64)  # [R, P]: how often each prompt is in a resample

    def mean(self, values: np.ndarray, weights: np.ndarray) -> Interval:
        """Returns the weighted mean of `values` over all questions, with its interval.

        To compare two variants, pass the differences of their values.

        Args:
            values: [P, Q], one value for each question.
            weights: [P, Q]. A question with weight 0 does not count.

        Raises:
            ValueError: every weight is 0.
        """
        above, below = (values * weights).sum(1), weights.sum(1)
        if not below.any():
            raise ValueError("no question has a weight")
        totals = self._drawn @ below
        means = (self._drawn @ above)[totals > 0] / totals[totals > 0]
        low, high = np.quantile(means, (0.025, 0.975))
        return Interval(float(above.sum() / below.sum()), float(low), float(high))
