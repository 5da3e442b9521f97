"""The demo agent answers about its own generated screens, for trials without a download.

It clicks on a named element. An instruction is, for example, "click red star". The current screen
is the last step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...agent.vocabulary import BIN_CENTERS
from ..actions import Action, UnparsableAnswer
from ..samples import Past, Sample
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


def turns(sample: Sample, screens: Sequence[Screen]) -> Messages:
    """Makes the current turn, after the turn before it and the demonstration's reply."""
    current = messages(sample, screens[-1:])
    if not sample.past:
        return current
    said = [text(_said(sample.past[-1], screens[-2]))]
    return [{"role": "assistant", "content": said}, *current]


def _said(past: Past, screen: Screen) -> str:
    """Writes a click as the agent does. It has no words for other actions."""
    points = [action.point for action in past.act(screen.size) if action.kind == "click"]
    if not points or points[0] is None:
        return past.said
    x, y = (_center(place) for place in screen.to_thousandths(points[0]))
    return f"click ( x={x} y={y} )"


def _center(place: int) -> int:
    """Returns the nearest of the agent's words for coordinates, which are centers of bins."""
    return min(BIN_CENTERS, key=lambda center: abs(center - place))


def parse(answer: str, screen: Screen) -> tuple[Action, ...]:
    """Reads a click. The agent's coordinates are thousandths of the screen."""
    matched = _ANSWER.fullmatch(answer.strip())
    if not matched:
        raise UnparsableAnswer("not 'click ( x=... y=... )'")
    return (Action("click", screen.from_thousandths((float(matched[1]), float(matched[2])))),)


def load(checkpoint: str, trust_remote_code: bool) -> tuple[Any, Any]:
    from ...agent import load_agent

    return load_agent()


SHIPPED_AGENT = Family("agent", messages, parse, load, turns)
