"""OpenCUA answers with PyAutoGUI code, in pixels of the resized screenshot.

The grammar follows xlang-ai/OpenCUA (MIT). Its checkpoints bring their own code (1-D positions,
another tokenizer), so the family has its own `load`.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from starkv_compile import OptionError

from ..actions import Action, Point, UnparsableAnswer
from ..samples import Past, Sample
from ..screens import Screen
from .base import Family, Messages, text

_SYSTEM = (
    "You are a GUI agent. You are given a task and a screenshot of the screen. You need to perform "
    "a series of pyautogui actions to complete the task."
)
_AGENT = (
    "\n\nFor each step, provide your response in this format:\n\nThought:\n  - What is done, what "
    "is left, and the most logical next action.\n\nAction:\n  Provide clear, concise, and "
    "actionable instructions.\n\nFinally, output the action as PyAutoGUI code, or as "
    'computer.triple_click(x=..., y=...) or computer.terminate(status="success" or "failure").'
)

_POINTED = {
    "click": "click",
    "doubleClick": "double_click",
    "tripleClick": "triple_click",
    "rightClick": "right_click",
    "middleClick": "middle_click",
    "moveTo": "move",
    "dragTo": "drag_to",
    "triple_click": "triple_click",
}
_NAMES = {kind: name for name, kind in _POINTED.items() if name != "triple_click"}
_BY_CLICKS = {1: "click", 2: "double_click", 3: "triple_click"}
_BY_BUTTON = {"left": "click", "right": "right_click", "middle": "middle_click"}


def messages(sample: Sample, screens: Sequence[Screen]) -> Messages:
    """Makes a chat of the earlier steps as replies, then the current screenshot and the task."""
    agent = sample.setting != "point"
    asked = sample.instruction
    if agent:
        asked = (
            f"# Task Instruction:\n{asked}\n\nPlease generate the next move according to the "
            "screenshot, task instruction and previous steps (if provided)."
        )
    chat: Messages = [{"role": "system", "content": _SYSTEM + (_AGENT if agent else "")}]
    older = len(sample.past) - (len(screens) - 1)
    for number, past in enumerate(sample.past):
        if number >= older:
            chat.append({"role": "user", "content": [{"type": "image"}]})
        chat.append({"role": "assistant", "content": _said(number, past)})
    return [*chat, {"role": "user", "content": [{"type": "image"}, text(asked)]}]


def _said(number: int, past: Past) -> str:
    return f"# Step {number + 1}:\n## Action:\n{past.said}\n"


def write(actions: Sequence[Action], screen: Screen) -> str | None:
    """Writes actions as the family answers, or returns None if it has no word for one of them."""
    lines = [_line(action, screen) for action in actions]
    return None if None in lines else "\n".join(line for line in lines if line)


def _line(action: Action, screen: Screen) -> str | None:
    where = ""
    if action.point:
        x, y = screen.to_shown(action.point)
        where = f"x={x}, y={y}"
    if action.kind in _NAMES:
        return f"pyautogui.{_NAMES[action.kind]}({where})"
    if action.kind == "type":
        return f"pyautogui.write(message={action.text!r})"
    if action.kind in ("press", "hotkey"):
        return f"pyautogui.{action.kind}(keys={list(action.keys)!r})"
    if action.kind == "scroll" and action.direction in ("up", "down") and action.amount:
        amount = action.amount if action.direction == "up" else -action.amount
        return f"pyautogui.scroll({amount:g}{', ' + where if where else ''})"
    if action.kind == "finish":
        return f"computer.terminate(status={action.text!r})"
    return "computer.wait()" if action.kind == "wait" else None


def parse(answer: str, screen: Screen) -> tuple[Action, ...]:
    """Reads the lines that call PyAutoGUI or `computer` with plain values."""
    lines = [line.strip() for line in answer.splitlines()]
    calls = [line for line in lines if line.startswith(("pyautogui.", "computer."))]
    if not calls:
        raise UnparsableAnswer("no line that calls pyautogui or computer")
    return tuple(_action(line, screen) for line in calls)


def _action(line: str, screen: Screen) -> Action:
    name, values, named = _call(line)
    if name in _POINTED:
        point, clicks = _point(name, values, named, screen), named.get("clicks", 1)
        kind = _POINTED[name]
        if name == "click":
            button = named.get("button", "left")
            if type(clicks) is not int or not isinstance(button, str):
                raise UnparsableAnswer(f"click with clicks={clicks!r}, button={button!r}")
            if clicks != 1 and button != "left":
                raise UnparsableAnswer(f"{clicks} clicks with the {button} button")
            kind = _BY_BUTTON.get(button, "") if clicks == 1 else _BY_CLICKS.get(clicks, "")
        return Action(kind, point)
    if name == "write":
        return Action("type", text=_only(str, name, values, named, "message"))
    if name in ("press", "hotkey"):
        return Action(name, keys=_keys(name, values, named))
    if name == "scroll":
        amount = _only((int, float), name, values[:1], named, "clicks")
        there = bool(values[1:]) or "x" in named
        where = _point(name, values[1:], named, screen) if there else None
        if not 0 < abs(amount) < 1e9:
            raise UnparsableAnswer(f"scroll by {amount!r}")
        return Action("scroll", where, direction="up" if amount > 0 else "down", amount=abs(amount))
    if name == "terminate":
        return Action("finish", text=_only(str, name, values, named, "status"))
    if name == "wait":
        return Action("wait")
    raise UnparsableAnswer(f"unknown call {line!r}")


def _call(line: str) -> tuple[str, list[Any], dict[str, Any]]:
    try:
        call = ast.parse(line, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            raise UnparsableAnswer(f"no call: {line!r}")
        values = [ast.literal_eval(value) for value in call.args]
        named = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise UnparsableAnswer(f"no call with plain values: {line!r} ({error})") from None
    return call.func.attr, values, named


def _point(name: str, values: list[Any], named: dict[str, Any], screen: Screen) -> Point:
    pair: list[Any] = values[:2] if len(values) >= 2 else [named.get("x"), named.get("y")]
    if not all(type(value) in (int, float) and abs(value) < 1e9 for value in pair):
        raise UnparsableAnswer(f"{name} at {pair!r}")
    return screen.from_shown((float(pair[0]), float(pair[1])))


def _only(kind: Any, name: str, values: list[Any], named: dict[str, Any], argument: str) -> Any:
    value = values[0] if len(values) == 1 else named.get(argument)
    if len(values) > 1 or not isinstance(value, kind) or isinstance(value, bool):
        raise UnparsableAnswer(f"{name} with {argument}={value!r}")
    return value


def _keys(name: str, values: list[Any], named: dict[str, Any]) -> tuple[str, ...]:
    """Reads keys. The Command key becomes Control, as in the published evaluation."""
    keys = named.get("keys", values[0] if len(values) == 1 else values)
    keys = [keys] if isinstance(keys, str) else keys
    if not isinstance(keys, (list, tuple)) or not all(isinstance(key, str) for key in keys):
        raise UnparsableAnswer(f"{name} with {keys!r}")
    return tuple("ctrl" if key.lower() in ("cmd", "command") else key for key in keys)


class _Processor:
    """Joins the checkpoint's tokenizer and image processor into one processor."""

    def __init__(self, tokenizer: Any, image_processor: Any) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def apply_chat_template(self, chat: Messages, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(chat, **{"tokenize": False, **options})

    def __call__(self, text: list[str], images: list[Any], return_tensors: str) -> Any:
        """Returns input_ids [1, L], attention_mask, pixel_values and grid_thws [images, 3].

        The template writes one image token for each picture. The model's own forward replaces it
        with one for each visual token.
        """
        inputs = self.tokenizer(text, return_tensors=return_tensors)
        pictures = self.image_processor.preprocess(images=images, return_tensors=return_tensors)
        inputs["pixel_values"] = pictures["pixel_values"]
        inputs["grid_thws"] = pictures["image_grid_thw"]
        return inputs

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        return self.tokenizer.batch_decode(ids, **options)


def load(checkpoint: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """Loads (model, processor) with the checkpoint's own code, as its model card says.

    Raises:
        OptionError: `trust_remote_code` is False.
    """
    if not trust_remote_code:
        raise OptionError(
            f"{checkpoint}: OpenCUA's checkpoints bring their own code, which would run on this "
            "machine; give --trust-remote-code if you trust it"
        )
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    own = {"trust_remote_code": True}
    model = AutoModel.from_pretrained(checkpoint, dtype="auto", **own)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **own)
    return model, _Processor(tokenizer, AutoImageProcessor.from_pretrained(checkpoint, **own))


# Its code puts visual tokens in by itself, so a session would count too few.
OPENCUA = Family("opencua", messages, parse, load, fits_sessions=False)
