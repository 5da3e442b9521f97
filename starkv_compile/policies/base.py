"""What a policy is."""

from __future__ import annotations

from typing import ClassVar

from ..config import StarKVConfig
from ..errors import OptionError
from .inputs import Scored, ScoreInputs

STEPS = 1000
"""To how many parts of the largest budget the others are rounded: integers on any length."""


class Policy:
    """Scores the tokens of one layer.

    per_head: whether each KV head keeps a set of its own. window: how many of the last tokens are
    kept whatever their score, and score the others; None: as many as the configuration says.
    observers: of how many of the last queries a mask is needed, where more than the window's score.
    reads: the options of scoring that act here.
    """

    per_head: ClassVar[bool] = False
    window: ClassVar[int | None] = None
    observers: ClassVar[int] = 0
    reads: ClassVar[frozenset[str]] = frozenset({"pool"})

    def __init__(self, config: StarKVConfig) -> None:
        self.config = config

    def is_uneven(self) -> bool:
        """Whether layers keep different numbers of tokens, in the same total."""
        return self.config.layer_budgets is not None

    def layer_weights(self, layers: int) -> tuple[int, ...]:
        """Where it is: what each layer keeps beyond its window, in proportion.

        Raises:
            OptionError: `layer_budgets` is for another number of layers.
        """
        given = self.config.layer_budgets or (1.0,) * layers
        if len(given) != layers:
            raise OptionError(
                f"layer_budgets has {len(given)} values, but {layers} layers are compressed; give "
                "one for each, first to last"
            )
        return tuple(max(1, round(STEPS * budget / max(given))) for budget in given)

    def score(self, inputs: ScoreInputs) -> Scored:
        """Scores float32, higher = more important, and the layer's new state.

        [B, P]; per head [B, G, P]; or of all L tokens, of which the window's are not read.
        """
        raise NotImplementedError
