"""Reads from AndroidControl's accessibility trees where elements are on an Android screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .actions import Point
from .boxes import area, contains
from .files import Record
from .wire import integer, message, messages, parse, string

# Field numbers of android_env's android_accessibility_*.proto, in forest, window, tree and node.
_WINDOWS, _TREE, _NODES = 1, 11, 1
_BOUNDS, _CLASS, _DESCRIPTION, _HINT, _TEXT, _VISIBLE, _TOOLTIP = 2, 3, 4, 5, 7, 23, 31
_ALWAYS = ("android.widget.Switch", "android.widget.EditText")


@dataclass(frozen=True)
class Element:
    """Holds an element of a screen.

    box: [left, top, right, bottom] in pixels. label: its text and description in lower case.
    """

    box: tuple[float, float, float, float]
    label: str

    def to_json(self) -> dict[str, Any]:
        return {"box": list(self.box), "label": self.label}


def element_at(elements: Sequence[Element], point: Point) -> Element | None:
    """Returns the smallest element at the point, or None."""
    there = [element for element in elements if contains(element.box, point)]
    return min(there, key=lambda element: area(element.box), default=None)


def elements_of_forest(data: bytes) -> list[Element]:
    """Returns the elements of a TFRecord's tree that are visible and have a text.

    Switches and text fields count without a text. This is the authors' choice (google-research
    issue 2120).

    Raises:
        ValueError: the bytes are no such tree.
    """
    found = []
    for window in messages(parse(data), _WINDOWS):
        for node in messages(message(window, _TREE), _NODES):
            bounds = message(node, _BOUNDS)
            left, top, right, bottom = (integer(bounds, side) for side in (1, 2, 3, 4))
            texts = [string(node, field) for field in (_TEXT, _DESCRIPTION)]
            hints = [string(node, field) for field in (_HINT, _TOOLTIP)]
            speaks = any(texts) or any(hints) or string(node, _CLASS) in _ALWAYS
            if speaks and integer(node, _VISIBLE) and left < right and top < bottom:
                found.append(Element((left, top, right, bottom), _label(texts)))
    return found


def elements_of_json(record: Record) -> Iterator[Element]:
    """Yields the elements of a record of UGround's 500 steps.

    An element has "bbox_pixels", "text" and "content_description".
    """
    for node in record.parts("accessibility_tree"):
        box = node.part("bbox_pixels")
        sides = ("x_min", "y_min", "x_max", "y_max")
        left, top, right, bottom = (box.number(side) for side in sides)
        texts = [node.values.get(name) for name in ("text", "content_description")]
        yield Element((left, top, right, bottom), _label(texts))


def _label(texts: Sequence[Any]) -> str:
    return " ".join(text for text in texts if isinstance(text, str) and text).lower()
