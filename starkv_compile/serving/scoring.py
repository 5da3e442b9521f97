"""Chooses the tokens of a prompt that stay, by the policies of this package."""

from __future__ import annotations

import torch

from ..kernels.ops import STARKV
from ..kernels.reference.star import Layout, fresh_state
from ..policies import ScoreInputs
from .rule import Rule

Tensor = torch.Tensor


def kept_tokens(
    rule: Rule,
    queries: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    capacity: int,
    layout: Layout,
    layer: int,
) -> Tensor:
    """Places of the tokens of one prompt that stay in one layer, ascending.

    Args:
        rule: the engine's rule.
        queries: [H, W, D], the prompt's last queries, after rotary positions.
        key: [G, L, D], after rotary positions.
        value: [G, L, D].
        scale: factor of the products of queries and keys.
        capacity: how many stay.
        layout: what the tokens show.
        layer: number of the layer.

    Returns:
        [capacity], or [G, capacity] if each head keeps a set of its own.
    """
    policy, window = rule.config.policy, rule.config.scoring_window
    length = key.shape[1]
    places = torch.arange(length, device=key.device)[None]
    described, counts = layout, _counts(layout)
    if policy.per_head:
        heads = key.shape[0]
        *by_token, current = layout
        frame, row, column = (t[:, None].expand(-1, heads, -1) for t in by_token)
        described = Layout(frame, row, column, current)
        places = places[:, None].expand(-1, heads, -1)
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
        counts=counts,
        state=fresh_state(key[None], layout.current),
        index=places,
        novelty=None,
        layer=layer,
        window=window,
        capacity=capacity,
        new=length,
    )
    scores = policy.score(inputs).scores
    return STARKV.select_tokens(scores, None, length, window, capacity)[0]


def _counts(layout: Layout) -> Tensor:
    """[1, 2] int64: tokens of text and of frames."""
    visual = (layout.frame >= 0).sum(-1, keepdim=True)
    return torch.cat([layout.frame.shape[1] - visual, visual], -1)
