"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from typing import ClassVar

import torch

from .base import Policy
from .inputs import Scored, ScoreInputs

SINKS = 4
FIRST = 2.0**24
"""More than any place; up to here float32 tells every place from the next."""


class StreamingLLM(Policy):
    """The first 4 tokens and the last C - 4 (Xiao et al., arXiv 2309.17453).

    Kept keys keep their positions, here as in all policies; the authors' own cache numbers them
    anew. No query scores, so that the last token alone is kept whatever its score.
    """

    name: ClassVar[str] = "streaming_llm"
    fixed_window: ClassVar[int | None] = 1

    def score(self, inputs: ScoreInputs) -> Scored:
        places = inputs.places()
        return Scored(torch.where(places <= SINKS, FIRST, places.float()), inputs.state)
