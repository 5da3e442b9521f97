"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from typing import ClassVar

import torch

from .base import Policy
from .inputs import Scored, ScoreInputs

SINKS = 4
FIRST = 2.0**24
"""More than any place. Up to here, float32 holds every whole number exactly."""


class StreamingLLM(Policy):
    """StreamingLLM (Xiao et al., arXiv 2309.17453): keeps the first 4 tokens and the last C - 4.

    Kept keys keep their positions, as with all policies; the authors' cache gives them new ones. No
    query scores tokens, so the window is the last token, and the option `window` has no effect.
    """

    name: ClassVar[str] = "streaming_llm"
    fixed_window: ClassVar[int | None] = 1

    def score(self, inputs: ScoreInputs) -> Scored:
        places = inputs.places()
        return Scored(torch.where(places <= SINKS, FIRST, places.float()), inputs.state)
