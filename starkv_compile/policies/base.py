"""What a policy is."""

from __future__ import annotations

from typing import ClassVar

from ..config import StarKVConfig
from .inputs import Scored, ScoreInputs


class Policy:
    """Scores the tokens of one layer.

    per_head: whether each KV head keeps a set of its own. window: how many of the last tokens are
    kept whatever their score, and score the others; None: as many as the configuration says.
    """

    per_head: ClassVar[bool] = False
    window: ClassVar[int | None] = None

    def __init__(self, config: StarKVConfig) -> None:
        self.config = config

    def score(self, inputs: ScoreInputs) -> Scored:
        """Scores float32, higher = more important, and the layer's new state.

        [B, P]; per head [B, G, P]; or of all L tokens, of which the window's are not read.
        """
        raise NotImplementedError
