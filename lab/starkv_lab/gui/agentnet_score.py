"""Computes AgentNetBench's score of a step as its published evaluator does.

Source: description and code of xlang-ai/OpenCUA, `evaluation/agentnetbench` (MIT), as of January
2026. Earlier versions gave full marks to any scroll, any order of keys and any extra action.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .actions import Action
from .boxes import contains
from .samples import Size

NEAR = 0.01 * math.sqrt(2)  # share of the screen; a point within it loses nothing
FALL = 120.0  # how fast the score falls beyond it
SIMILAR = 0.8  # texts with this similarity count as equal

_TYPES = {
    "click": "click",
    "double_click": "doubleclick",
    "right_click": "rightclick",
    "triple_click": "tripleclick",
    "middle_click": "middleclick",
    "move": "moveto",
    "drag_to": "dragto",
    "type": "write",
    "press": "press",
    "hotkey": "hotkey",
    "finish": "terminate",
}

_SIGNS = {"up": 1, "down": -1}

Step = tuple[str, Any]
"""A type in lower case, and its value: a point as shares of the screen, a text, a list of keys, or
(direction 1, -1 or 0; amount or None) of a scroll. A point of the demonstration comes with a list
of boxes [x, y, width, height] that are right too."""


def best(
    options: Sequence[Sequence[dict[str, Any]]], actions: Sequence[Action], size: Size
) -> float:
    """Returns the best score of `actions` (points in pixels of `size`) against any option."""
    answer = _merged([step for action in actions for step in _answered(action, size)], ("press",))
    truths = [_merged([_shown(values) for values in o], ("press", "hotkey")) for o in options]
    return max(_score(truth, answer) for truth in truths)


def _answered(action: Action, size: Size) -> list[Step]:
    point = action.point and (action.point[0] / size[0], action.point[1] / size[1])
    if action.kind == "scroll":
        scroll = ("scroll", (_SIGNS.get(action.direction or "", 0), action.amount))
        return [scroll] if point is None else [("moveto", point), scroll]
    if action.kind in ("press", "hotkey"):
        return [(action.kind, [key.lower() for key in action.keys])]
    if action.kind in ("type", "finish"):
        return [(_TYPES[action.kind], action.text)]
    return [(_TYPES.get(action.kind, action.kind), point)]


def _shown(values: dict[str, Any]) -> Step:
    """Converts an action of the data set into the form of `_answered`."""
    kind, params = values["type"].lower(), values["params"]
    if kind == "scroll":
        return kind, scroll_of(params)
    if kind in ("press", "hotkey"):
        return kind, [key.lower() for key in keys_of(params)]
    if kind == "write":
        return kind, params.get("content") or params.get("text") or ""
    if kind == "terminate":
        return kind, params.get("status")
    boxes = [box["rel_bbox"] for box in (values.get("metadata") or {}).get("bboxes", [])]
    return kind, ((params["position"]["x"], params["position"]["y"]), boxes)


def scroll_of(params: dict[str, Any]) -> tuple[int, float | None]:
    """Returns (1 for up, -1 for down or 0; the distance, or None if the data set has none)."""
    amount = params.get("amount", params.get("pixels"))
    if amount is None:
        return _SIGNS.get(params.get("direction", ""), 0), None
    return (amount > 0) - (amount < 0), abs(amount)


def keys_of(params: dict[str, Any]) -> list[str]:
    keys = params["keys"]
    return [str(key) for key in keys] if isinstance(keys, list) else [keys]


def _merged(steps: Sequence[Step], enters: Sequence[str]) -> list[Step]:
    """Merges writing and a following Enter, by a type in `enters`, into writing a line."""
    merged: list[Step] = []
    open_line = False
    for kind, value in steps:
        if open_line and kind in enters and value in (["enter"], ["return"]):
            merged[-1] = "write", merged[-1][1] + "\n"
            open_line = False
        else:
            merged.append((kind, value))
            open_line = kind == "write"
    return merged


def _score(truth: Sequence[Step], answer: Sequence[Step]) -> float:
    if not answer or answer[0][0] not in {kind for kind, _ in truth}:
        return 0.0
    surplus = min(1.0, len(truth) / len(answer))
    if truth[0][0] == "terminate":
        return surplus * (answer[0] == truth[0])
    scores: dict[str, list[float]] = defaultdict(list)
    for number, (kind, right) in enumerate(truth):
        same = number < len(answer) and answer[number][0] == kind
        scores[kind].append(_value_score(kind, right, answer[number][1]) if same else 0.0)
    return surplus * sum(sum(part) / len(part) for part in scores.values()) / len(scores)


def _value_score(kind: str, right: Any, value: Any) -> float:
    if kind == "write":
        return _text_score(right.lower().strip(), value.lower().strip())
    if kind in ("press", "hotkey", "terminate"):
        return float(right == value)
    if kind == "scroll":
        return _scroll_score(right, value)
    point, boxes = right
    if any(contains((x, y, x + w, y + h), value) for x, y, w, h in boxes):
        return 1.0
    return math.exp(-FALL * max(0.0, math.dist(point, value) - NEAR))


def _scroll_score(right: tuple[int, float | None], value: tuple[int, float | None]) -> float:
    if right[0] and right[0] != value[0]:
        return 0.0
    if right[1] is None or value[1] is None:
        return float(right[0] == value[0])
    high = max(right[1], value[1])
    return min(right[1], value[1]) / high if high else 1.0


def _text_score(right: str, value: str) -> float:
    longest = max(len(right), len(value))
    if not longest:
        return 1.0
    return min(1.0, (1 - edits(right, value) / longest) / SIMILAR)


def edits(left: str, right: str) -> int:
    """Returns Levenshtein's distance: the number of letters inserted, deleted or changed."""
    above = list(range(len(right) + 1))
    for row, letter in enumerate(left, start=1):
        here = [row]
        for column, other in enumerate(right, start=1):
            change = above[column - 1] + (letter != other)
            here.append(min(above[column] + 1, here[-1] + 1, change))
        above = here
    return above[-1]
