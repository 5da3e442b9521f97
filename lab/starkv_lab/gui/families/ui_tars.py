"""UI-TARS-1.5 answers `Thought: ...` and `Action: click(start_box='(x,y)')`.

Coordinates are pixels that the model saw. Prompt and grammar follow bytedance/UI-TARS
(`README_evaluation.md` there, Apache-2.0). Its authors name the phone's actions for AndroidControl
in issue 85 there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..actions import Action, Point, UnparsableAnswer
from ..samples import Past, Sample
from ..screens import Screen
from .base import Family, Messages, conversation, folded

_DESKTOP = """click(start_box='<|box_start|>(x1,y1)<|box_end|>')
left_double(start_box='<|box_start|>(x1,y1)<|box_end|>')
right_single(start_box='<|box_start|>(x1,y1)<|box_end|>')
drag(start_box='<|box_start|>(x1,y1)<|box_end|>', end_box='<|box_start|>(x2,y2)<|box_end|>')
hotkey(key='') # keys in lower case with spaces between them
type(content='') # with \\n at the end to submit
scroll(start_box='<|box_start|>(x1,y1)<|box_end|>', direction='down or up or right or left')
wait()
finished()"""
_PHONE = """click(start_box='<|box_start|>(x1,y1)<|box_end|>')
long_press(start_box='<|box_start|>(x1,y1)<|box_end|>')
type(content='')
scroll(direction='down or up or right or left')
open_app(app_name='')
press_back()
press_home()
wait()
finished()"""
_SPACES = {
    "point": "click(start_box='<|box_start|>(x1,y1)<|box_end|>')",
    "desktop": _DESKTOP,
    "phone": _PHONE,
}

_NOTE = """## Note
- Use English in `Thought` part.
- Write a small plan and finally summarize your next action (with its target element) in one sentence in `Thought` part.
"""  # noqa: E501

_POINTED = {
    "click": "click",
    "left_double": "double_click",
    "right_single": "right_click",
    "long_press": "long_press",
}
_BARE = {"wait": "wait", "press_back": "back", "press_home": "home"}
_NAMES = {kind: name for name, kind in (*_POINTED.items(), *_BARE.items())}

_TEXTUAL = re.compile(r"(type|finished)\(content=(['\"])(.*)\2\)", re.DOTALL)
_CALL = re.compile(r"(\w+)\((.*)\)", re.DOTALL)
_ARGUMENT = re.compile(r"\s*(\w+)=(['\"])(.*?)\2\s*(?:,|$)", re.DOTALL)
_BETWEEN = re.compile(r"(?<=\))\s*\n\s*(?=\w+\()")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_ESCAPED = re.compile(r"\\(.)")


def messages(sample: Sample, screens: Sequence[Screen]) -> Messages:
    thinks = sample.setting != "point"
    lines = [
        "You are a GUI agent. You are given a task and your action history, with screenshots. You "
        "need to perform the next action to complete the task.",
        "",
        "## Output Format",
        "```",
        *(["Thought: ..."] if thinks else []),
        "Action: ...",
        "```",
        "",
        "## Action Space",
        _SPACES[sample.setting],
        "",
        *([_NOTE] if thinks else []),
        "## User Instruction",
        sample.instruction,
    ]
    return conversation(sample, screens, "\n".join(lines), _said)


def _said(past: Past, screen: Screen) -> str:
    written = write(past.act(screen.size), screen)
    return f"Thought: {past.said}" + (f"\nAction: {written}" if written else "")


def write(actions: Sequence[Action], screen: Screen) -> str | None:
    """Writes actions as the family answers, or returns None if it has no word for one of them."""
    calls = []
    start: Point | None = None
    for action in folded(actions):
        if action.kind == "move":
            start = action.point
            continue
        call = _call(action, screen, start)
        if call is None or (start is not None and action.kind != "drag_to"):
            return None
        calls.append(call)
        start = None
    return "\n\n".join(calls) if calls and start is None else None


def _call(action: Action, screen: Screen, start: Point | None) -> str | None:
    def box(point: Point) -> str:
        x, y = screen.to_shown(point)
        return f"'<|box_start|>({x},{y})<|box_end|>'"

    if action.kind in _POINTED.values() and action.point:
        return f"{_NAMES[action.kind]}(start_box={box(action.point)})"
    if action.kind == "drag_to" and action.point and start:
        return f"drag(start_box={box(start)}, end_box={box(action.point)})"
    if action.kind == "scroll":
        where = f"start_box={box(action.point)}, " if action.point else ""
        return f"scroll({where}direction='{action.direction}')"
    if action.kind == "type":
        return f"type(content='{_escaped(action.text or '')}')"
    if action.kind == "finish":
        return "finished()" if action.text in (None, "success") else None
    if action.kind == "hotkey" or (action.kind == "press" and len(action.keys) == 1):
        return f"hotkey(key='{' '.join(action.keys)}')"
    if action.kind == "open_app" and "'" not in (action.text or ""):
        return f"open_app(app_name='{action.text}')"
    return f"{_NAMES[action.kind]}()" if action.kind in _BARE.values() else None


def parse(answer: str, screen: Screen) -> tuple[Action, ...]:
    """Reads the calls after the only `Action:`. A box means its centre."""
    plain = answer.replace("<|box_start|>", "").replace("<|box_end|>", "")
    _, found, calls = plain.partition("Action:")
    if not found or "Action:" in calls:
        raise UnparsableAnswer("not one 'Action:'")
    actions: list[Action] = []
    for call in _BETWEEN.split(calls.strip()):
        actions += _actions(call.strip(), screen)
    return tuple(actions)


def _actions(call: str, screen: Screen) -> list[Action]:
    if textual := _TEXTUAL.fullmatch(call):
        words = _ESCAPED.sub(_unescaped, textual[3])
        return [Action("type", text=words) if textual[1] == "type" else _done()]
    matched = _CALL.fullmatch(call)
    if not matched:
        raise UnparsableAnswer(f"no call: {call!r}")
    name, arguments = matched[1], _arguments(matched[2])
    start = next(
        (arguments[k] for k in ("start_box", "point", "start_point") if k in arguments), None
    )
    point = None if start is None else _point(start, screen)
    if name in _POINTED:
        return [Action(_POINTED[name], point)]
    if name == "drag":
        end = arguments.get("end_box", arguments.get("end_point"))
        if end is None:
            raise UnparsableAnswer("drag without an end")
        return [Action("move", point), Action("drag_to", _point(end, screen))]
    if name == "scroll":
        return [Action("scroll", point, direction=arguments.get("direction"))]
    if name == "hotkey":
        keys = tuple(arguments.get("key", "").split())
        return [Action("press" if len(keys) < 2 else "hotkey", keys=keys)]
    if name == "open_app":
        return [Action("open_app", text=arguments.get("app_name"))]
    if name == "finished":
        return [_done()]
    if name in _BARE:
        return [Action(_BARE[name])]
    raise UnparsableAnswer(f"unknown action {name!r}")


def _done() -> Action:
    return Action("finish", text="success")


def _arguments(inside: str) -> dict[str, str]:
    arguments, place = {}, 0
    while place < len(inside.rstrip()):
        matched = _ARGUMENT.match(inside, place)
        if not matched:
            raise UnparsableAnswer(f"arguments {inside!r}")
        arguments[matched[1]], place = matched[3], matched.end()
    return arguments


def _point(box: str, screen: Screen) -> Point:
    values = [float(number) for number in _NUMBER.findall(box)]
    if _NUMBER.sub("", re.sub(r"</?point>", "", box)).strip("()[], ") or len(values) not in (2, 4):
        raise UnparsableAnswer(f"point {box!r}")
    x, y = values[0::2], values[1::2]
    return screen.from_shown((sum(x) / len(x), sum(y) / len(y)))


def _escaped(words: str) -> str:
    for plain, written in (("\\", "\\\\"), ("'", "\\'"), ('"', '\\"'), ("\n", "\\n")):
        words = words.replace(plain, written)
    return words


def _unescaped(matched: re.Match[str]) -> str:
    letter = matched[1]
    return {"n": "\n"}.get(letter, letter if letter in "\\'\"" else matched[0])


UI_TARS = Family("ui-tars", messages, parse)
