"""What a GUI model wants done, whatever words its family uses for it."""

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
"""Kinds that need a point."""

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
    """An answer that is no action of its family. It counts as wrong, and the record says why."""


@dataclass(frozen=True)
class Action:
    """One thing to do.

    kind: one of KINDS. point: where, in pixels of the screenshot as its file has them; of a scroll,
    where the pointer is, if the answer says so. text: what is typed (a newline at its end is the
    Enter key), the app that is opened, or how the task ended ("success", "failure"). keys: of
    "press" one after the other, of "hotkey" together. direction: where a scroll moves the view
    ("down" shows what is further down). amount: of a scroll, in the data set's own unit, if the
    answer says so; never negative.
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
        """What is set of it."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value not in (None, ())}
