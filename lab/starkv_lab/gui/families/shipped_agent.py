"""The shipped agent answers about its own generated screens, for trials without a download.

It clicks on a named element. An instruction is, for example, "click red star". The current screen
is the last step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..actions import Action, UnparsableAnswer
from ..samples import Sample
from ..screens import Screen
from .base import Family, Messages, text

_ANSWER = re.compile(r"click \( x=(\d{1,4}) y=(\d{1,4}) \)")


def messages(sample: Sample, screens: Sequence[Screen]) -> Messages:
    """Makes one turn of all screens with their step numbers, and the question about the last."""
    last = len(sample.past) + 1
    content: list[dict[str, Any]] = []
    for step in range(last + 1 - len(screens), last + 1):
        content += [text(f"step {step}"), {"type": "image"}]
    verb, _, name = sample.instruction.partition(" ")
    return [{"role": "user", "content": [*content, text(f"{verb} step {last} {name}")]}]


def parse(answer: str, screen: Screen) -> tuple[Action, ...]:
    """Reads a click. The agent's coordinates are thousandths of the screen."""
    matched = _ANSWER.fullmatch(answer.strip())
    if not matched:
        raise UnparsableAnswer("not 'click ( x=... y=... )'")
    return (Action("click", screen.from_thousandths((float(matched[1]), float(matched[2])))),)


def load(checkpoint: str, trust_remote_code: bool) -> tuple[Any, Any]:
    from ...agent import load_agent

    return load_agent()


SHIPPED_AGENT = Family("agent", messages, parse, load)
