"""Describes a family of GUI models: how to ask it, and what its answers mean."""

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
    """Describes models that share a prompt and a grammar of answers.

    messages: makes the chat for a sample and its screens, oldest first. Its {"type": "image"} parts
    stand for the screens in that order. parse: returns the actions of an answer about a screen, or
    raises `UnparsableAnswer`. load: returns (model, processor) of a checkpoint; its second argument
    says whether the checkpoint's own code may run. None loads with `AutoProcessor` and
    `AutoModelForImageTextToText`. in_turns: as `messages`, with each screen in a turn of its own;
    None if `messages` does so. fits_sessions: whether an `AgentSession` can run its models.
    """

    name: str
    messages: Callable[[Sample, Sequence[Screen]], Messages]
    parse: Callable[[str, Screen], tuple[Action, ...]]
    load: Callable[[str, bool], tuple[Any, Any]] | None = None
    in_turns: Callable[[Sample, Sequence[Screen]], Messages] | None = None
    fits_sessions: bool = True

    def turns(self, sample: Sample, screens: Sequence[Screen]) -> Messages:
        """Returns the chat for a sample, with each screen in a turn of its own."""
        return (self.in_turns or self.messages)(sample, screens)


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def conversation(
    sample: Sample,
    screens: Sequence[Screen],
    opening: str,
    say: Callable[[Past, Screen], str],
) -> Messages:
    """Makes a chat: `opening` and the first screenshot, then replies and later screenshots.

    The current screenshot comes last. Steps without a screenshot in the chat follow the opening as
    text.
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
    """Joins a move and the scroll after it into one scroll at that point."""
    found: list[Action] = []
    for action in actions:
        if action.kind == "scroll" and found and found[-1].kind == "move":
            point = found.pop().point
            action = Action("scroll", point, direction=action.direction, amount=action.amount)
        found.append(action)
    return found
