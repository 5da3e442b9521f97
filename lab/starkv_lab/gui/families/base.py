"""What a family of GUI models has to know: how it is asked, and what its answers mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..actions import Action
from ..samples import Past, Sample
from ..screens import Screen

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """Models that share a prompt and a grammar of answers.

    messages: the chat for a sample, whose screens are given, oldest first; {"type": "image"} parts
    stand for them in that order. parse: the actions of an answer about a screen, or
    `UnparsableAnswer`. load: (model, processor) of a checkpoint, and whether its own code may run;
    None: as `AutoProcessor` and
    `AutoModelForImageTextToText` do.
    """

    name: str
    messages: Callable[[Sample, Sequence[Screen]], Messages]
    parse: Callable[[str, Screen], tuple[Action, ...]]
    load: Callable[[str, bool], tuple[Any, Any]] | None = None


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def conversation(
    sample: Sample,
    screens: Sequence[Screen],
    opening: str,
    say: Callable[[Past, Screen], str],
) -> Messages:
    """`opening` with the first screenshot, then what was said to each, the current one last.

    Steps whose screenshot is no longer shown are told in words, after the opening.
    """
    silent = len(sample.past) - (len(screens) - 1)
    if silent > 0:
        said = "\n".join(f"{n}. {past.said}" for n, past in enumerate(sample.past[:silent], 1))
        opening = f"{opening}\n\nSteps taken before:\n{said}"
    messages = [{"role": "user", "content": [text(opening), {"type": "image"}]}]
    shown = sample.past[max(0, silent) :]
    for past, screen in zip(shown, screens, strict=False):
        reply = {"role": "assistant", "content": [text(say(past, screen))]}
        messages += [reply, {"role": "user", "content": [{"type": "image"}]}]
    return messages


def folded(actions: Sequence[Action]) -> list[Action]:
    """A move followed by a scroll as one scroll there."""
    found: list[Action] = []
    for action in actions:
        if action.kind == "scroll" and found and found[-1].kind == "move":
            point = found.pop().point
            action = Action("scroll", point, direction=action.direction, amount=action.amount)
        found.append(action)
    return found
