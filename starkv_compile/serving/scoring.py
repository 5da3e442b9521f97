"""Chooses the tokens of a prompt that stay, by the policies of this package."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.ops import STARKV
from ..kernels.reference.star import Layout, fresh_state
from ..policies import ScoreInputs
from .rule import Rule

Tensor = torch.Tensor


@dataclass(frozen=True)
class Stored:
    """What stayed of one prompt in one layer.

    Attributes:
        places: int32 [k], or [G, k] if each head keeps a set of its own: places in the prompt.
        novelty: the same shape: what the policy found new about these tokens; None if it says
            nothing of the kind.
    """

    places: Tensor
    novelty: Tensor | None


def choose(
    rule: Rule,
    queries: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    capacity: int,
    layout: Layout,
    layer: int,
    before: Stored | None = None,
) -> tuple[Tensor, Stored]:
    """Chooses among the L stored tokens of one prompt in one layer.

    Args:
        rule: the engine's rule.
        queries: [H, W, D], the last queries, after rotary positions.
        key: [G, L, D], after rotary positions.
        value: [G, L, D].
        scale: factor of the products of queries and keys.
        capacity: how many stay.
        layout: what all tokens of the prompt show up to here, dropped ones too.
        layer: number of the layer.
        before: what stayed when the prompt was compacted before. These tokens come first.

    Returns:
        Which of the L stay, ascending, [capacity], or [G, capacity] if each head keeps a set of its
        own; and what is stored then.
    """
    policy, window = rule.config.policy, rule.config.scoring_window
    length, seen = key.shape[1], layout.frame.shape[1]
    known = 0 if before is None else before.places.shape[-1]
    new = length - known
    places = torch.arange(seen - new, seen, device=key.device)
    if policy.per_head:
        places = places.expand(key.shape[0], -1)
    if before is not None:
        places = torch.cat([before.places.long(), places], -1)
    novelty = None
    if before is not None and before.novelty is not None:
        fresh = before.novelty.new_ones(*places.shape[:-1], new)
        novelty = torch.cat([before.novelty, fresh], -1)[None]
    frame, row, column = (axis[0][places][None] for axis in layout[:3])
    # Of the newest frame, what came before the last stop may be gone, and counts as gone.
    place = layout.current - (seen - new)
    described = Layout(frame, row, column, torch.where(place >= 0, place + known, -1))
    inputs = ScoreInputs(
        query=queries[None],
        key=key[None],
        value=value[None],
        mask=None,
        scale=scale,
        log_sum_exp=None,
        hidden=None,
        real=None,
        layout=described,
        counts=_counts(layout),
        state=fresh_state(key[None], described.current),
        index=places[None],
        novelty=novelty,
        layer=layer,
        window=window,
        capacity=capacity,
        new=new,
    )
    scored = policy.score(inputs)
    kept = STARKV.select_tokens(scored.scores, None, length, window, capacity)
    now = novelty if scored.novelty is None else scored.novelty
    held = places.gather(-1, kept[0]).int()
    return kept[0], Stored(held, None if now is None else now.gather(-1, kept)[0])


def _counts(layout: Layout) -> Tensor:
    """[1, 2] int64: tokens of text and of frames."""
    visual = (layout.frame >= 0).sum(-1, keepdim=True)
    return torch.cat([layout.frame.shape[1] - visual, visual], -1)
