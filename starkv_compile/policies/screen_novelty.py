"""What is new on the screen and looked at; of the text what is looked at, and what is new."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..kernels.ops import STARKV, op
from ..kernels.reference import novelty
from ..kernels.reference.attention import pool
from ..validation import number
from .base import PooledPolicy
from .inputs import Scored, ScoreInputs
from .key_novelty import share

Tensor = torch.Tensor


@op
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
) -> Tensor:
    """See `ScreenNovelty`: each kind's own scores, which are not to be compared. [B, P].

    attention [B, G, P] of `window_attention`; the others of all L tokens, `unlike` 0 for screens.
    """
    past = attention.shape[-1]
    visual = frame[:, :past] >= 0
    seen = attention.mean(1)
    # Text alone is pooled, over text alone: neighbours in the token order that are on a screen may
    # be at another end of it, and a run of text may be short.
    is_text = ~visual if real is None else ~visual & real[:, :past]
    near = pool(is_text[:, None].float(), width)[:, 0]
    text = pool(seen.masked_fill(~is_text, 0.0)[:, None], width)[:, 0] / near.clamp(min=1e-6)
    text = share(text.where(is_text, 0.0)) + novelty_weight * share(unlike[:, :past])
    seen = seen.masked_fill(~visual, 0.0)
    mean = seen.sum(-1, keepdim=True) / visual.sum(-1, keepdim=True).clamp(min=1)
    attended = 1.0 + attention_weight * seen / mean.clamp(min=1e-30)
    return torch.where(visual, spatial[:, :past] * temporal[:, :past] * attended, text)


@op
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
    """Novelty in space x novelty in time x attention. Ours.

    A token of a screen: score_t = n_t m_t (1 + nu a_t / mean a). n_t: 1 - mean cosine of its keys
    with those of its up to 8 neighbours on the screen, as in ST-Lite (arXiv 2603.00188). m_t, for
    older screens: 1 - cosine with the newest screen's token at the same place, as a share of the
    largest, for what earlier prompts left half of that and a half; else 1. a_t: attention that the
    last W queries pay to it, mean over heads; mean a: over all screens' tokens; nu:
    `attention_weight`. k: keys of all KV heads side by side. Text is scored as in `KeyNovelty`,
    beside text alone: a_t, pooled over neighbours, and how unlike the other text its keys are.

    The two kinds are not compared, so neither can crowd the other out: of the session's text a
    share is kept `text_weight` times as large as of its screens (`reference.novelty.share_out`).
    """

    name: ClassVar[str] = "screen_novelty"

    attention_weight: float = number(0.5, least=0)
    """Weight of attention to a screen's token next to its novelty [nu]. 0 = none."""

    novelty_weight: float = number(1.0, least=0)
    """Weight of key novelty next to attention, for text. 0 = none."""

    text_weight: float = number(2.0, above=0)
    """How many times as large a share of the text as of the screens is kept. Shares count what the
    session has seen, whether it is still stored or not."""

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
