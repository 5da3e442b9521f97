"""Points and boxes of screens."""

from __future__ import annotations

from collections.abc import Sequence

from .actions import POINTED, Action, Point


def contains(box: Sequence[float], point: Point) -> bool:
    """Whether `point` is in `box` [left, top, right, bottom], edges included."""
    left, top, right, bottom = box
    return left <= point[0] <= right and top <= point[1] <= bottom


def area(box: Sequence[float]) -> float:
    left, top, right, bottom = box
    return (right - left) * (bottom - top)


def hit(box: Sequence[float], actions: Sequence[Action]) -> bool:
    """Whether the answer is one action at a point of the box: how grounding is judged.

    Which pointer action it is does not count, as the benchmarks only ask where.
    """
    if len(actions) != 1 or actions[0].kind not in POINTED or actions[0].point is None:
        return False
    return contains(box, actions[0].point)
