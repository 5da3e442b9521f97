"""STaR-KV's score of every token, from the three axes. Source: arXiv 2606.01790."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from ...validation import choice, integer, number
from . import entropy, spatial, temporal
from .attention import pool
from .spatial import REFERENCE, Counting

ENTROPIES = ("subspace", "global", "off")
GRIDS = ("true", "square")


class Layout(NamedTuple):
    """What each stored token is: text, or a place on a frame.

    frame, row, column: [B, L] int64. frame is -1 for text; else it counts frames in time order.
    current: [B, N] int64, places in 0..L-1 of the current frame's tokens in reading order, -1
    beyond the row's last.
    """

    frame: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    current: torch.Tensor


class State(NamedTuple):
    """What one layer carries from one agent step to the next. It begins with zeros.

    mi: [B, G] float32, averaged mutual information. mi_steps: [B] int64, frames profiled.
    pattern: [B, G, N] float32, averaged attention over the current frame.
    pattern_count: [B] int64, tokens of the frame that `pattern` averages.
    """

    mi: torch.Tensor
    mi_steps: torch.Tensor
    pattern: torch.Tensor
    pattern_count: torch.Tensor


def fresh_state(key: torch.Tensor, current: torch.Tensor) -> State:
    """The state before a session's first prompt. key [B, G, L, D], current [B, N]."""
    batch, groups = key.shape[:2]
    steps = torch.zeros(batch, dtype=torch.int64, device=key.device)
    mi = torch.zeros(batch, groups, dtype=torch.float32, device=key.device)
    pattern = mi.new_zeros(batch, groups, current.shape[1])
    return State(mi, steps, pattern, steps.clone())


@dataclass(frozen=True, kw_only=True)
class StarOptions:
    """The options of STaR-KV's scores. Symbols in brackets are the paper's."""

    pool: int = integer(5, least=1, most=63, odd=True)
    """Width of the moving average over attention scores, in tokens; odd. 1: no average."""

    boost: float = number(2.0, least=0)
    """Adds this much score to the current frame [alpha]. Each token's part follows the norm of its
    hidden state. 0: no boost."""

    boost_temperature: float = number(3.5, above=0)
    """Temperature of the softmax that divides the boost among the tokens."""

    mi_weight: float = number(0.5, least=0, most=1)
    """Weight of the mutual-information prior after its ramp [lambda]. 0: no prior, 1: the full
    prior."""

    mi_warm_steps: int = integer(5, least=0)
    """Agent steps before the prior begins."""

    mi_ramp_steps: int = integer(10, least=1)
    """Agent steps over which the prior grows to `mi_weight`."""

    mi_decay: float = number(0.9, least=0, most=1)
    """Weight of the past in the average of mutual information over agent steps."""

    mi_temperature: float = number(1.0, above=0)
    """Temperature of the softmax over subspaces [tau]."""

    frame_decay: float = number(0.1, least=0)
    """Discount rate per frame of age [delta]. 0: no discount."""

    frame_floor: float = number(0.0, least=0, most=1)
    """Smallest factor that the discount can reach [D_min]."""

    decay_warm_steps: int = integer(0, least=0)
    """Agent steps before the discount begins."""

    pattern_decay: float = number(0.9, least=0, most=1)
    """Weight of the past in the average attention pattern [rho]."""

    stability_floor: float = number(0.0, least=0, most=1)
    """Smallest stability that the discount uses [epsilon]."""

    entropy: str = choice("subspace", ENTROPIES)
    """Where entropy acts. "subspace": it sharpens or flattens each KV head's scores by their own
    entropy, before heads are fused. "global": one power acts on the fused scores, as in the paper.
    It is monotone, so it cannot change which tokens stay. "off": nowhere."""

    entropy_low: float = number(0.75, above=0)
    """Temperature at zero entropy [T_min]."""

    entropy_high: float = number(1.25, above=0)
    """Temperature at full entropy [T_max]."""

    grid: str = choice("true", GRIDS)
    """Screen grid for mutual information. "true": the frame's rows and columns. "square": a
    square guessed from the number of tokens, as in the paper's release."""

    def scalars(self) -> tuple[int | float | str, ...]:
        """Returns the values, in the order of the fields."""
        return tuple(getattr(self, name) for name in STAR_OPTIONS)

    @staticmethod
    def of_scalars(values: Sequence[int | float | str]) -> StarOptions:
        """Returns the options that have these `scalars`."""
        return StarOptions(**dict(zip(STAR_OPTIONS, values, strict=True)))  # type: ignore[arg-type]


STAR_OPTIONS = tuple(field.name for field in fields(StarOptions))
"""Names in order: a compiler traces this, and not a dataclass's own listing."""


class Scores(NamedTuple):
    """The score after each axis. Selection reads final [B, P]."""

    group: torch.Tensor  # [B, G, P] pooled window attention of each KV head, boosted
    weights: torch.Tensor  # [B, G] mutual-information prior over groups
    spatial: torch.Tensor  # [B, P]
    temporal: torch.Tensor  # [B, P]
    final: torch.Tensor  # [B, P]
    state: State


def star_scores(
    attention: torch.Tensor,
    hidden: torch.Tensor | None,
    real: torch.Tensor | None,
    layout: Layout,
    state: State,
    options: StarOptions,
    counting: Counting = REFERENCE,
) -> Scores:
    """Scores every token before the window.

    Args:
        attention: [B, G, P] from `window_attention`.
        hidden: [B, S, E], input of the key projection for the S newest tokens; None skips the
            boost.
        real: [B, L] bool, False at padding; None without padding.
        layout, state, options: see there.
        counting: implementations to use.
    """
    _, groups, past = attention.shape
    current = layout.current
    valid = (current >= 0) & (current < past)
    place = current.where(valid, 0)
    # Heads were averaged within a KV head before pooling and boost, which are both linear.
    group = pool(attention, options.pool)
    if real is not None:  # pooling spills attention onto padding before a prompt's first tokens
        group = group.masked_fill(~real[:, None, :past], 0.0)
    if hidden is not None and options.boost > 0:
        added = frame_boost(hidden, layout.frame, layout.current, past, options.boost_temperature)
        group = group + options.boost * added[:, None]
    unshaped = group
    everything = torch.full_like(layout.frame[:, 0], past)
    tokens = everything if real is None else real[:, :past].sum(1)
    if options.entropy == "subspace":
        group = entropy.reshape_subspaces(group, tokens, options.entropy_low, options.entropy_high)
    base = group.mean(1)
    on_frame = group.gather(-1, place[:, None].expand(-1, groups, -1))
    winner = group.argmax(1)

    mi, mi_steps = _update_mi(on_frame, layout, valid, place, state, options, counting)
    weights = spatial.mi_weights(mi, options.mi_temperature)
    ramp = ((mi_steps - options.mi_warm_steps) / options.mi_ramp_steps).clamp(0.0, 1.0)
    share = (options.mi_weight * ramp).float()[:, None]
    prior = (1.0 - share) + share * groups * weights.gather(1, winner)
    spatial_score = base * prior

    several = (layout.frame.amax(-1) > 0)[:, None]  # one frame: no time axis yet
    pattern, pattern_count, stability = temporal.update_pattern(
        on_frame, valid & several, state.pattern, state.pattern_count, options.pattern_decay
    )
    age = temporal.age(layout.frame)[:, :past]
    stable = options.stability_floor + (1.0 - options.stability_floor) * stability.gather(1, winner)
    factor = temporal.discount(age, stable, options.frame_decay, options.frame_floor)
    if options.decay_warm_steps > 0:
        warm = (mi_steps <= options.decay_warm_steps)[:, None]
        factor = factor.masked_fill(warm, 1.0)
    temporal_score = spatial_score * factor

    final = temporal_score
    if options.entropy == "global":
        degree = entropy.temperature(
            unshaped.mean(1), tokens, options.entropy_low, options.entropy_high
        )
        final = entropy.reshape_global(temporal_score, degree)
    return Scores(
        group,
        weights,
        spatial_score,
        temporal_score,
        final,
        State(mi, mi_steps, pattern, pattern_count),
    )


def frame_boost(
    hidden: torch.Tensor,
    frame: torch.Tensor,
    current: torch.Tensor,
    past: int,
    temperature: float,
) -> torch.Tensor:
    """[B, P]: the boost of each token of the current frame, 0 elsewhere. Its sum is 1 or 0.

    hidden [B, S, E] as in `star_scores`; frame and current as in `Layout`; past: P.
    """
    offset = frame.shape[-1] - hidden.shape[1]  # stored tokens that are not new
    # An earlier chunk brought the first tokens of a frame that it cut, without their hidden states.
    valid = (current >= offset) & (current < past)
    place = current.where(valid, 0)
    source = (place - offset).clamp(min=0)
    rows = hidden.gather(1, source[..., None].expand(-1, -1, hidden.shape[-1]))
    added = spatial.boost(rows, valid, temperature)
    empty = torch.zeros(hidden.shape[0], past + 1, dtype=added.dtype, device=added.device)
    slot = place.where(valid, past)  # the last slot collects the rest
    return empty.scatter(1, slot, added)[:, :past]


def _update_mi(
    on_frame: torch.Tensor,
    layout: Layout,
    valid: torch.Tensor,
    place: torch.Tensor,
    state: State,
    options: StarOptions,
    counting: Counting,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Averaged mutual information [B, G] and frames profiled [B], this frame included."""
    if options.grid == "square":
        row, column = spatial.square_grid(valid)
    else:
        row, column = layout.row.gather(1, place), layout.column.gather(1, place)
    now = spatial.mutual_information(on_frame, row, column, valid, counting)
    shown = valid.any(-1)
    first = (state.mi_steps == 0)[:, None]
    averaged = torch.where(first, now, options.mi_decay * state.mi + (1 - options.mi_decay) * now)
    mi = torch.where(shown[:, None], averaged, state.mi)
    return mi, state.mi_steps + shown.long()
