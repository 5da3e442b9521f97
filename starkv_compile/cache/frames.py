"""Removes old frames from a cache, and on request the text of their turns."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import CacheError
from .layer import StarKVLayer
from .state import SharedState


def keep_newest_frames(
    layers: Sequence[StarKVLayer], shared: SharedState, frames: int, text_from: int
) -> None:
    """The body of `StarKVCache.keep_newest_frames`, which documents it.

    layers: those that store tokens, each as many as the others.
    """
    layout = shared.layout
    if layout is None or not layers:
        return
    seen = layers[0].seen
    if len(layout.frame) != 1:
        raise CacheError(
            f"keep_newest_frames: the cache has {len(layout.frame)} rows, whose frames may "
            "differ in size; give each session a cache of its own"
        )
    layout.truncate(seen)  # a prompt that failed may have described more
    layout.pad_text(seen)  # the reply is text
    frame, counted = layout.frame[0], layout.counted[0]
    visual = frame >= 0
    dropped = visual & (frame < int(frame.max()) + 1 - frames)
    dropped[:text_from] |= ~visual[:text_from]
    dropped = (dropped | ~counted) & visual.cumsum(0).bool()
    leaving = int((dropped & counted).sum())
    if not leaving:
        return
    layout.counted = layout.counted & ~dropped
    places = [layer.places()[0] for layer in layers]
    left = max(
        min(int((~dropped[stored]).sum(-1).min()) for stored in places),
        max(int((~dropped & ~visual)[stored].sum(-1).max()) for stored in places),
    )
    for layer, stored in zip(layers, places, strict=True):
        order = _oldest_visual_first(frame[stored], dropped[stored])
        layer.keep_only(order[..., layer.stored - left :].sort(-1).values)
        layer.retired += leaving


def _oldest_visual_first(frame: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """Slots in the order in which they are dropped: `gone`, then frame by frame, then text."""
    last = frame.max() + 1
    rank = torch.where(gone, -1, torch.where(frame < 0, last, frame))
    return rank.argsort(dim=-1, stable=True)
