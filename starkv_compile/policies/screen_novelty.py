"""The default policy: it keeps what is new on screens and attended to, and a share of the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..kernels import shapes
from ..kernels.ops import STARKV, op
from ..kernels.reference import novelty
from ..kernels.reference.attention import pool
from ..validation import flag, number
from .base import PooledPolicy
from .inputs import Scored, ScoreInputs
from .key_novelty import share

Tensor = torch.Tensor


@op(shape=shapes.scores)
def novelty_scores(
    attention: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    unlike: Tensor,
    real: Tensor | None,
    frame: Tensor,
    width: int,
    attention_weight: float,
    novelty_weight: float,
    of_turn: Tensor | None,
) -> Tensor:
    """Returns the scores [B, P] of `ScreenNovelty`. Those of text and of screens do not compare.

    attention is [B, G, P] of `window_attention`. The other tensors cover all L tokens. `unlike` is
    0 for screens. Screens' tokens that are not `of_turn` (bool; None: all are) count as if their
    attention were the mean of those that are.
    """
    past = attention.shape[-1]
    visual = frame[:, :past] >= 0
    seen = attention.mean(1)
    # Only text is pooled, over text only: neighbours in the token order may be at opposite ends of
    # a screen, and a run of text may be short.
    is_text = ~visual if real is None else ~visual & real[:, :past]
    near = pool(is_text[:, None].float(), width)[:, 0]
    text = pool(seen.masked_fill(~is_text, 0.0)[:, None], width)[:, 0] / near.clamp(min=1e-6)
    text = share(text.where(is_text, 0.0)) + novelty_weight * share(unlike[:, :past])
    read = visual if of_turn is None else visual & of_turn[:, :past]
    seen = seen.masked_fill(~read, 0.0)
    mean = seen.sum(-1, keepdim=True) / read.sum(-1, keepdim=True).clamp(min=1)
    attended = 1.0 + attention_weight * (seen / mean.clamp(min=1e-30)).where(read, 1.0)
    return torch.where(visual, spatial[:, :past] * temporal[:, :past] * attended, text)


@op(shape=shapes.scores)
def share_out(
    scores: Tensor,
    real: Tensor | None,
    frame: Tensor,
    counts: Tensor | None,
    window: int,
    capacity: int,
    text_weight: float,
) -> Tensor:
    """See `reference.novelty.share_out`."""
    return novelty.share_out(scores, real, frame, counts, window, capacity, text_weight)


@dataclass(frozen=True, kw_only=True)
class ScreenNovelty(PooledPolicy):
    """Novelty in space x novelty in time x attention. Source: this project.

    A token of a screen has the score n_t m_t (1 + nu a_t / mean a). A token's key is here the keys
    of all KV heads, concatenated.

    * n_t is 1 - mean cosine of the token's key with those of its up to 8 neighbours on the screen,
      as in ST-Lite (arXiv 2603.00188).
    * m_t is 1 on the newest screen. On older screens it is 1 - cosine with the newest screen's
      token at the same place, as a share of the largest. A token kept from an earlier prompt has
      half of that share plus a half.
    * a_t is the attention that the last W queries pay to the token, averaged over heads. The mean
      of a is over the tokens of the turn's screens. nu is `attention_weight`. A token kept from an
      earlier turn of a session has the mean: the question of this turn need not be that of the
      next ones. With `stored_attention=True` its attention counts like that of any other.

    Text is scored as in `KeyNovelty`, among text only: by a_t, pooled over neighbours, and by how
    unlike the other text its keys are.

    Screens and text are never compared, so neither crowds the other out. Of the session's text, a
    share stays that is `text_weight` times as large as the share of its screens
    (`reference.novelty.share_out`).
    """

    name: ClassVar[str] = "screen_novelty"

    attention_weight: float = number(0.5, least=0)
    """Weight of attention relative to novelty, for tokens of a screen [nu]. 0: no attention."""

    stored_attention: bool = flag(False)
    """Whether the attention of a turn counts for tokens of screens that earlier turns left in the
    cache. For tokens of the same turn, which may come in several chunks, it counts in any case."""

    novelty_weight: float = number(1.0, least=0)
    """Weight of key novelty relative to attention, for text. 0: no novelty."""

    text_weight: float = number(2.0, above=0)
    """The share of text that stays, divided by the share of screens that stays. Shares are of all
    tokens that the session has seen, stored or dropped."""

    def score(self, inputs: ScoreInputs) -> Scored:
        frame, spatial = inputs.layout[0], inputs.spatial_novelty()
        scores = STARKV.novelty_scores(
            inputs.window_attention(),
            spatial,
            inputs.temporal_novelty(),
            inputs.key_novelty(frame < 0),
            inputs.real,
            frame,
            self.pool,
            self.attention_weight,
            self.novelty_weight,
            None if self.stored_attention else inputs.of_turn,
        )
        shared = STARKV.share_out(
            scores,
            inputs.real,
            frame,
            inputs.counts,
            inputs.window,
            inputs.capacity,
            self.text_weight,
        )
        return Scored(shared, inputs.state, spatial)
