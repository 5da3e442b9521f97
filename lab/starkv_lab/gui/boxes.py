"""Computes with points and boxes on screens."""

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
    """Whether the answer is one pointer action inside the box, which is right for grounding.

    Any pointer action counts, because the benchmarks only ask for the place.
    """
    if len(actions) != 1 or actions[0].kind not in POINTED or actions[0].point is None:
        return False
    return contains(box, actions[0].point)
