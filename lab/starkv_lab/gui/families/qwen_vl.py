"""Qwen2.5-VL and Qwen3-VL answer with a call of the tool `computer_use` or `mobile_use`.

The grammar follows QwenLM's computer-use and mobile-use cookbooks. Coordinates are pixels of the
resized screenshot in Qwen2.5-VL's answers, and thousandths of the screen in Qwen3-VL's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..actions import Action, Point, UnparsableAnswer
from ..samples import Past, Sample, Size
from ..screens import Screen
from .base import Family, Messages, conversation, folded, text

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)

_POINTED = {
    "left_click": "click",
    "double_click": "double_click",
    "triple_click": "triple_click",
    "right_click": "right_click",
    "middle_click": "middle_click",
    "mouse_move": "move",
    "left_click_drag": "drag_to",
    "click": "click",
    "long_press": "long_press",
}
_NAMES = {kind: name for name, kind in _POINTED.items() if name != "click"}
_BUTTONS = {
    "back": Action("back"),
    "home": Action("home"),
    "enter": Action("press", keys=("enter",)),
}

_DESKTOP = {
    "key": "presses the keys in `keys`",
    "type": "types `text`",
    "mouse_move": "moves the pointer to `coordinate`",
    "left_click": "clicks at `coordinate`",
    "left_click_drag": "drags to `coordinate`",
    "right_click": "clicks the right button at `coordinate`",
    "middle_click": "clicks the middle button at `coordinate`",
    "double_click": "clicks twice at `coordinate`",
    "scroll": "scrolls by `pixels`, up if positive",
    "wait": "waits `time` seconds",
    "terminate": "ends the task with `status`",
}
_PHONE = {
    "click": "taps at `coordinate`",
    "long_press": "presses at `coordinate` for `time` seconds",
    "swipe": "swipes from `coordinate` to `coordinate2`",
    "type": "types `text`",
    "system_button": "presses `button`: Back, Home, Menu or Enter",
    "open": "opens the app named `text`",
    "wait": "waits `time` seconds",
    "terminate": "ends the task with `status`",
}
_PARAMETERS = {
    "keys": "array",
    "text": "string",
    "coordinate": "array",
    "coordinate2": "array",
    "pixels": "number",
    "time": "number",
    "button": "string",
    "status": "string",
}


@dataclass(frozen=True)
class _Scale:
    """Converts coordinates of one generation: thousandths, or pixels that the model saw."""

    relative: bool

    def resolution(self, screen: Screen) -> Size:
        return (1000, 1000) if self.relative else screen.shown

    def read(self, values: Any, screen: Screen) -> Point:
        right = isinstance(values, list) and len(values) == 2
        if not right or not all(type(v) in (int, float) and abs(v) < 1e9 for v in values):
            raise UnparsableAnswer(f"coordinate {values!r}")
        point = (float(values[0]), float(values[1]))
        return screen.from_thousandths(point) if self.relative else screen.from_shown(point)

    def write(self, point: Point, screen: Screen) -> list[int]:
        return list((screen.to_thousandths if self.relative else screen.to_shown)(point))

    def messages(self, sample: Sample, screens: Sequence[Screen]) -> Messages:
        tool = _tool(sample.setting == "phone", self.resolution(screens[-1]))
        opening = sample.instruction
        if sample.setting != "point":
            opening = f"The task: {opening}\nGive the next action by one call of the tool."
        system = {"role": "system", "content": [text(tool)]}
        return [system, *conversation(sample, screens, opening, self._said)]

    def _said(self, past: Past, screen: Screen) -> str:
        calls = [self.call(action, screen) for action in folded(past.act(screen.size))]
        return "\n".join([past.said, *(call for call in calls if call)])

    def call(self, action: Action, screen: Screen) -> str | None:
        """Writes the action as a call of the desktop tool; None if the tool has no word for it."""
        values = self._arguments(action, screen)
        if values is None:
            return None
        call = {"name": "computer_use", "arguments": values}
        return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"

    def _arguments(self, action: Action, screen: Screen) -> dict[str, Any] | None:
        point = action.point and self.write(action.point, screen)
        if action.kind in _NAMES:
            return {"action": _NAMES[action.kind], "coordinate": point}
        if action.kind == "type":
            return {"action": "type", "text": action.text}
        if action.kind in ("press", "hotkey"):
            return {"action": "key", "keys": list(action.keys)}
        if action.kind == "scroll" and action.direction in ("up", "down"):
            pixels = (action.amount or 0) * (1 if action.direction == "up" else -1)
            where = {} if point is None else {"coordinate": point}
            return {"action": "scroll", **where, "pixels": pixels} if pixels else None
        if action.kind == "finish":
            return {"action": "terminate", "status": action.text or "success"}
        return {"action": "wait", "time": 1} if action.kind == "wait" else None

    def parse(self, answer: str, screen: Screen) -> tuple[Action, ...]:
        """Returns the actions of all calls, in their order."""
        calls = _CALL.findall(answer)
        if not calls:
            raise UnparsableAnswer("no <tool_call>...</tool_call>")
        return tuple(self._action(call, screen) for call in calls)

    def _action(self, call: str, screen: Screen) -> Action:
        try:
            values = json.loads(call)
            name, arguments = values["name"], values["arguments"]
            kind = arguments["action"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UnparsableAnswer(f"no call of a tool ({type(error).__name__}: {error})") from None
        if name not in ("computer_use", "mobile_use") or not isinstance(kind, str):
            raise UnparsableAnswer(f"tool {name!r}, action {kind!r}")
        point = self.read(arguments["coordinate"], screen) if "coordinate" in arguments else None
        if kind in _POINTED:
            return Action(_POINTED[kind], point)
        if kind == "swipe":
            return _swipe(point, self.read(arguments.get("coordinate2"), screen))
        if kind == "scroll":
            return _scroll(point, arguments.get("pixels"), ("down", "up"))
        if kind == "hscroll":
            return _scroll(point, arguments.get("pixels"), ("left", "right"))
        return _wordy(kind, arguments)


def _wordy(kind: str, arguments: dict[str, Any]) -> Action:
    """Reads actions without a point."""
    if kind == "wait":
        return Action("wait")
    name, wanted = {
        "type": ("text", str),
        "open": ("text", str),
        "key": ("keys", list),
        "system_button": ("button", str),
        "terminate": ("status", str),
    }.get(kind, (None, None))
    if name is None or wanted is None:
        raise UnparsableAnswer(f"unknown action {kind!r}")
    value = arguments.get(name)
    if not isinstance(value, wanted):
        raise UnparsableAnswer(f"{kind} with {name}={value!r}")
    if kind == "key":
        keys = tuple(map(str, value))
        return Action("press" if len(keys) < 2 else "hotkey", keys=keys)
    if kind == "system_button":
        if value.lower() not in _BUTTONS:
            raise UnparsableAnswer(f"button {value!r}")
        return _BUTTONS[value.lower()]
    ours = {"type": "type", "open": "open_app", "terminate": "finish"}[kind]
    return Action(ours, text=value)


def _scroll(point: Point | None, pixels: Any, ways: tuple[str, str]) -> Action:
    if type(pixels) not in (int, float) or not 0 < abs(pixels) < 1e9:
        raise UnparsableAnswer(f"scroll by {pixels!r}")
    return Action("scroll", point, direction=ways[pixels > 0], amount=abs(pixels))


def _swipe(start: Point | None, end: Point) -> Action:
    """Reads a swipe as a scroll. A finger that moves up moves the view down."""
    if start is None or start == end:
        raise UnparsableAnswer("swipe that goes nowhere")
    right, down = end[0] - start[0], end[1] - start[1]
    if abs(down) >= abs(right):
        return Action("scroll", start, direction="up" if down > 0 else "down")
    return Action("scroll", start, direction="left" if right > 0 else "right")


def _tool(phone: bool, resolution: Size) -> str:
    """Describes the tool in a system prompt of the form that the family was trained on."""
    name, actions = ("mobile_use", _PHONE) if phone else ("computer_use", _DESKTOP)
    device = "a phone with a touch screen" if phone else "a computer by mouse and keyboard"
    width, height = resolution
    described = "\n".join(f"* `{action}`: {what}." for action, what in actions.items())
    properties: dict[str, Any] = {
        "action": {"type": "string", "enum": list(actions), "description": described}
    }
    used = [key for key in _PARAMETERS if any(f"`{key}`" in what for what in actions.values())]
    properties |= {key: {"type": _PARAMETERS[key]} for key in used}
    function = {
        "name": name,
        "description": f"Use {device}, and see screenshots of it.\n* The screen's resolution is "
        f"{width}x{height}.\n* A coordinate is [x, y] from the left and from the top.\n* Aim at "
        "the centre of elements.",
        "parameters": {"type": "object", "required": ["action"], "properties": properties},
    }
    return (
        "You are a helpful assistant.\n\n# Tools\n\nYou may call one or more functions to assist "
        "with the user query.\n\nYou are provided with function signatures within <tools></tools> "
        f"XML tags:\n<tools>\n{json.dumps({'type': 'function', 'function': function})}\n</tools>"
        "\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
        "<args-json-object>}\n</tool_call>"
    )


ABSOLUTE, RELATIVE = _Scale(relative=False), _Scale(relative=True)
QWEN2_5_VL = Family("qwen2.5-vl", ABSOLUTE.messages, ABSOLUTE.parse)
QWEN3_VL = Family("qwen3-vl", RELATIVE.messages, RELATIVE.parse)
