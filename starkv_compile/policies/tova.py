"""TOVA: it keeps what the last token attends to."""

from __future__ import annotations

from typing import ClassVar

from .base import Policy
from .inputs import Scored, ScoreInputs


class Tova(Policy):
    """TOVA, token omission via attention (Oren et al., arXiv 2401.06104), applied once per prompt.

    score_t = mean over all heads of the last query's attention to token t. The window is the last
    token, and the option `window` has no effect.
    """

    name: ClassVar[str] = "tova"
    fixed_window: ClassVar[int | None] = 1

    def score(self, inputs: ScoreInputs) -> Scored:
        return Scored(inputs.window_attention().mean(1), inputs.state)
