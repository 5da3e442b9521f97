"""TOVA: what the last token attends to."""

from __future__ import annotations

from typing import ClassVar

from .base import Policy
from .inputs import Scored, ScoreInputs


class Tova(Policy):
    """Token omission via attention (Oren et al., arXiv 2401.06104), applied once, to a prompt.

    score_t = mean over heads of the last query's attention to token t. The window is that query
    alone; the option `window` is not read.
    """

    name: ClassVar[str] = "tova"
    fixed_window: ClassVar[int | None] = 1

    def score(self, inputs: ScoreInputs) -> Scored:
        return Scored(inputs.window_attention().mean(1), inputs.state)
