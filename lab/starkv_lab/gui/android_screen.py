"""What stands where on an Android screen: AndroidControl's accessibility trees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .actions import Point
from .boxes import area, contains
from .files import Record
from .wire import integer, message, messages, parse, string

# Of android_env's android_accessibility_*.proto: forest.windows, window.tree, tree.nodes.
_WINDOWS, _TREE, _NODES = 1, 11, 1
_BOUNDS, _CLASS, _DESCRIPTION, _HINT, _TEXT, _VISIBLE, _TOOLTIP = 2, 3, 4, 5, 7, 23, 31
_ALWAYS = ("android.widget.Switch", "android.widget.EditText")


@dataclass(frozen=True)
class Element:
    """box: [left, top, right, bottom] in pixels. label: its text and description, lower case."""

    box: tuple[float, float, float, float]
    label: str

    def to_json(self) -> dict[str, Any]:
        return {"box": list(self.box), "label": self.label}


def element_at(elements: Sequence[Element], point: Point) -> Element | None:
    """The smallest element there; None: there is none."""
    there = [element for element in elements if contains(element.box, point)]
    return min(there, key=lambda element: area(element.box), default=None)


def elements_of_forest(data: bytes) -> list[Element]:
    """Of a TFRecord's tree: what is visible and says something, switches and text fields.

    That choice is the authors' (google-research issue 2120).

    Raises:
        ValueError: it is no such tree.
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
    """Of UGround's sample: a list of elements with "bbox_pixels", "text", "content_description"."""
    for node in record.parts("accessibility_tree"):
        box = node.part("bbox_pixels")
        sides = ("x_min", "y_min", "x_max", "y_max")
        left, top, right, bottom = (box.number(side) for side in sides)
        texts = [node.values.get(name) for name in ("text", "content_description")]
        yield Element((left, top, right, bottom), _label(texts))


def _label(texts: Sequence[Any]) -> str:
    return " ".join(text for text in texts if isinstance(text, str) and text).lower()
