"""Random tokens: a baseline that every policy must beat."""

from __future__ import annotations

from typing import ClassVar

from .base import Policy
from .inputs import Scored, ScoreInputs


class Random(Policy):
    """A uniform sample: different in each layer, the same in every run. A baseline.

    score_t is a hash of the layer and of the token's place in the session's stream. So at every
    turn the kept tokens are a sample of all tokens seen, old and new alike. The last W tokens stay,
    as with SnapKV.
    """

    name: ClassVar[str] = "random"

    def score(self, inputs: ScoreInputs) -> Scored:
        # Two rounds of multiply and shift, on 32 bits in an int64: no product overflows.
        index = inputs.places() if inputs.index is None else inputs.index
        bits = index + (inputs.layer + 1) * 0x9E3779B9
        for _ in range(2):
            bits = bits & 0xFFFFFFFF
            bits = ((bits >> 16) ^ bits) * 0x45D9F3B
        bits = bits & 0xFFFFFFFF
        return Scored((bits >> 8).float(), inputs.state)  # 24 bits: exact
