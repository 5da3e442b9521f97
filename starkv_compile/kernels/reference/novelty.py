"""How new a token is, compared with its neighbours, the newest frame, or all other tokens."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch.nn import functional as F

from .capacity import split_capacity

Tensor = torch.Tensor
Best = Callable[[Tensor, list[Tensor], list[Tensor]], Tensor]

AHEAD = ((0, 1), (1, -1), (1, 0), (1, 1))
"""(rows, columns) to the four neighbours that come later in reading order."""


def spatial_novelty(
    key: Tensor, frame: Tensor, row: Tensor, column: Tensor, earlier: Tensor
) -> Tensor:
    """1 - mean cosine with the up to 8 neighbours around each token on its frame.

    Args:
        key: [B, G, L, D]; the keys of all KV heads count as one vector.
        frame, row, column: [B, L] as in `star.Layout`; the tokens of a frame in reading order.
        earlier: [B, L - S] float32, the result for the stored tokens of earlier prompts, whose
            neighbours are gone. The S tokens of this prompt are compared with each other.

    Returns:
        [B, L] float32 in 0..2; 1 for text and for tokens without a neighbour. A key that is not
        finite resembles nothing.
    """
    before = earlier.shape[1]
    new = key.shape[2] - before
    key, frame, row, column = key[:, :, before:], *(t[:, before:] for t in (frame, row, column))
    size = _size(key)
    place = torch.arange(new, device=frame.device).expand_as(frame)
    visual = frame >= 0
    # The starts of the rows of all frames, in order. The last slot collects all other tokens.
    starts = visual & (column == 0)
    number = starts.long().cumsum(1)
    nowhere = torch.full((frame.shape[0], new + 2), new, dtype=torch.int64, device=frame.device)
    started = nowhere.scatter(1, torch.where(starts, number, new + 1), place)
    next_row = started.gather(1, number + 1)
    total = torch.zeros_like(size)
    count = torch.zeros_like(frame)
    for down, right in AHEAD:
        other = (next_row + column if down else place) + right
        found = visual & (other >= 0) & (other < new)
        other = other.clamp(0, new - 1)
        for axis, step in ((frame, 0), (row, down), (column, right)):
            found = found & (axis.gather(1, other) == axis + step)
        cosine = _cosine(key, size, other).where(found, 0.0)
        met = torch.where(found, other, new)  # each token is met once at most in one direction
        total = total + cosine + _at(met, cosine)
        count = count + found + _at(met, found.long())
    novelty = _unlike(total / count.clamp(min=1))
    return torch.cat([earlier, novelty], dim=1)


STANDS_FOR = 0.5
"""The least novelty in time of a token kept from an earlier prompt."""


def temporal_novelty(
    key: Tensor, frame: Tensor, row: Tensor, column: Tensor, current: Tensor, stored: int
) -> Tensor:
    """1 - cosine with the newest frame's token at the same place, as a share of the largest.

    Tokens kept from earlier prompts get s + (1 - s) times the share, s = `STANDS_FOR`: similar
    tokens of later frames may have been dropped in their favour.

    Args:
        key, frame, row, column, current: as above and in `star.Layout`.
        stored: how many tokens at the beginning are of earlier prompts.

    Returns:
        [B, L] float32 in 0..1; 1 for text, for the newest frame, and for places that it lacks.
    """
    places, on_frame = current.shape[1], current.clamp(min=0)
    width = column.gather(1, on_frame).where(current >= 0, 0).amax(1, keepdim=True) + 1
    place = (row * width + column).clamp(0, places - 1)
    # A frame that was cut has lost tokens: `current` holds what is left, one after the other.
    at = place.gather(1, on_frame).where(current >= 0, places)
    table = torch.full_like(F.pad(current, (0, 1)), -1).scatter(1, at, current)
    found = table.gather(1, place)
    other = found.clamp(min=0)
    matched = (frame >= 0) & (found >= 0) & (frame < frame.amax(1, keepdim=True))
    for axis in (row, column):
        matched = matched & (axis.gather(1, other) == axis)
    changed = _unlike(_cosine(key, _size(key), other)).where(matched, 0.0)
    share = changed / changed.amax(1, keepdim=True).clamp(min=1e-30)
    share = share.clamp(0.0, 1.0).where(matched, 1.0)
    known = torch.arange(frame.shape[1], device=frame.device) < stored
    return torch.where(known, STANDS_FOR + (1.0 - STANDS_FOR) * share, share)


def key_novelty(key: Tensor, among: Tensor) -> Tensor:
    """1 - mean cosine of each token's keys with those of the tokens `among`, itself included.

    The cost is linear in the prompt: the mean of cosines is a product with the mean of vectors of
    length 1.

    Args:
        key: [B, G, L, D]; the keys of all KV heads count as one vector.
        among: [B, L] bool.

    Returns:
        [B, L] float32 in 0..2; 0 for other tokens, and for a key that is not finite.
    """
    size = _size(key)
    good = among & size.isfinite() & (size > 0)
    scale = size.rsqrt().where(good, 0.0)
    keys = key.float().where(good[:, None, :, None], 0.0)
    mean = (scale[:, None, None] @ keys) / among.sum(-1).clamp(min=1)[:, None, None, None]
    cosine = (keys @ mean.transpose(2, 3))[..., 0].sum(1) * scale
    return _unlike(cosine).where(good, 0.0)


def share_out(
    scores: Tensor,
    real: Tensor | None,
    frame: Tensor,
    counts: Tensor | None,
    window: int,
    capacity: int,
    text_weight: float,
    *,
    best: Best | None = None,
) -> Tensor:
    """Scores that select text and screens separately, each by its own score and quota.

    So the scales of the two scores do not matter, and neither kind crowds the other out. With n
    text tokens and m tokens of screens, text gets the share text_weight n / (text_weight n + m) of
    the selected tokens, rounded down. If one kind has too few tokens, the other gets the rest. n
    and m count the whole session, without the window. If they counted stored tokens, the kind with
    the larger share would gain at each prompt.

    Args:
        scores: [B, P], not negative.
        real: [B, L] bool, False at padding, or None.
        frame: [B, L] as in `star.Layout`.
        counts: [B, 2], tokens of text and of screens in the session; None: those of `real`.
        window, capacity: as in `window_attention`.
        best: finds the best tokens of each kind; by default a sort, with ties to the earlier token.

    Returns:
        [B, P], 1 to 1.5 for tokens within their quota, else 0 to 0.5; within a kind by score.
    """
    past = scores.shape[-1]
    selected, _ = split_capacity(frame.shape[1], window, capacity)
    kinds = [frame >= 0, frame < 0]
    if real is not None:
        kinds = [kind & real for kind in kinds]
    on_screens, text = (kind[:, :past].sum(-1, keepdim=True) for kind in kinds)
    if counts is None:
        all_screens, all_text = on_screens, text
    else:
        in_window = [kind[:, past:].sum(-1, keepdim=True) for kind in kinds]
        all_screens = torch.maximum(counts[:, 1:] - in_window[0], on_screens)
        all_text = torch.maximum(counts[:, :1] - in_window[1], text)
    weight = Fraction(str(text_weight)).limit_denominator(1000)
    weighed = weight.numerator * all_text
    of_text = selected * weighed // (weighed + weight.denominator * all_screens).clamp(min=1)
    of_screens = torch.minimum(selected - of_text, on_screens)
    quotas = [of_screens, torch.minimum(selected - of_screens, text)]
    kinds = [kind[:, :past] for kind in kinds]
    final = (best or best_by_sort)(scores, kinds, quotas).float()
    for kind in kinds:
        mine = scores.masked_fill(~kind, 0.0)
        final = final + 0.5 * mine / mine.amax(-1, keepdim=True).clamp(min=1e-30)
    return final


def best_by_sort(scores: Tensor, kinds: list[Tensor], quotas: list[Tensor]) -> Tensor:
    """Marks the best tokens of each kind, as many as its quota: bool [B, P].

    kinds [B, P] bool each, quotas [B, 1] int64 each. Ties go to the earlier token.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(kinds[0])
    for kind, quota in zip(kinds, quotas, strict=True):
        mine = kind.gather(-1, order)
        chosen = chosen | (mine & (mine.long().cumsum(-1) <= quota))
    return torch.zeros_like(chosen).scatter(-1, order, chosen)


def _size(key: Tensor) -> Tensor:
    """[B, L]: squared length of each token's keys, concatenated."""
    return key.float().square().sum((1, 3))


def _cosine(key: Tensor, size: Tensor, other: Tensor) -> Tensor:
    """[B, L]: of each token's keys with those of the token at `other` [B, L]; 0 if undefined."""
    there = key.gather(2, other[:, None, :, None].expand_as(key))
    product = (key.float() * there.float()).sum((1, 3))
    cosine = product * (size * size.gather(1, other)).rsqrt()
    return cosine.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _unlike(cosine: Tensor) -> Tensor:
    """1 - cosine, at least 0: rounding makes the cosine of equal keys slightly more than 1.

    A negative share of a sum or maximum near 0 would be enormous.
    """
    return (1.0 - cosine).clamp(min=0.0)


def _at(place: Tensor, values: Tensor) -> Tensor:
    """Puts `values` [B, S] at `place`, with 0 elsewhere. The place S is dropped."""
    empty = values.new_zeros(values.shape[0], values.shape[1] + 1)
    return empty.scatter(1, place, values)[:, :-1]
