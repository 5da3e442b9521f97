"""Describes the actions of GUI models in one vocabulary for all families."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

Point = tuple[float, float]

POINTED = (
    "click",
    "double_click",
    "triple_click",
    "right_click",
    "middle_click",
    "long_press",
    "move",
    "drag_to",
)
"""Kinds of actions that need a point."""

KINDS = (
    *POINTED,
    "type",
    "press",
    "hotkey",
    "scroll",
    "open_app",
    "back",
    "home",
    "wait",
    "finish",
)

DIRECTIONS = ("up", "down", "left", "right")


class UnparsableAnswer(ValueError):
    """An answer is no action of its family. It counts as wrong, and the record gives the reason."""


@dataclass(frozen=True)
class Action:
    """Describes one action.

    kind: one of KINDS. point: the place in pixels of the screenshot's file; for a scroll, the
    pointer, if the answer gives it. text: the text to type (a newline at its end is the Enter
    key), the app to open, or how the task ended ("success", "failure"). keys: the keys that "press"
    presses one after another, or that "hotkey" presses together. direction: the direction in which
    a scroll moves the view ("down" shows what is further down). amount: the distance of a scroll
    in the data set's own unit, if the answer gives it; never negative.

    Raises:
        UnparsableAnswer: the kind is unknown, or lacks a value that it needs.
    """

    kind: str
    point: Point | None = None
    text: str | None = None
    keys: tuple[str, ...] = ()
    direction: str | None = None
    amount: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnparsableAnswer(f"action {self.kind!r}: known are {', '.join(KINDS)}")
        if self.kind in POINTED and self.point is None:
            raise UnparsableAnswer(f"{self.kind} without a point")
        if self.kind in ("type", "open_app") and self.text is None:
            raise UnparsableAnswer(f"{self.kind} without its text")
        if self.kind in ("press", "hotkey") and not self.keys:
            raise UnparsableAnswer(f"{self.kind} without a key")
        if self.kind == "scroll" and self.direction not in DIRECTIONS:
            raise UnparsableAnswer(f"scroll to {self.direction!r}: it goes {', '.join(DIRECTIONS)}")

    def to_json(self) -> dict[str, Any]:
        """Returns the values that are set."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value not in (None, ())}
