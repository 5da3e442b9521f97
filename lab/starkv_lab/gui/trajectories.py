"""Runs the steps of a demonstration on one `AgentSession`, as an agent that keeps its cache."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from starkv_compile import AgentSession, StarKVError

from .model import Answer, GuiModel, counts
from .samples import Reading, Sample, open_screen

ALL_STEPS = sys.maxsize
STEPS = ((1, 5), (6, 10), (11, 20), (21, ALL_STEPS))
"""First and last steps of the parts by which a table splits sessions."""


def reading_of(reading: Reading) -> Reading:
    """Returns how sessions read a data set: every earlier step is in the conversation."""
    return replace(reading, texts=ALL_STEPS)


def trajectories(samples: Iterable[Sample], where: str) -> Iterator[list[Sample]]:
    """Yields the samples of each trajectory, in the order of its steps.

    Args:
        where: what the error names, such as the folder.

    Raises:
        StarKVError: a sample belongs to no trajectory.
    """
    for trajectory, steps in groupby(samples, key=lambda sample: sample.trajectory):
        if trajectory is None:
            raise StarKVError(
                f"{where}: its samples are read as single questions, so there are no sessions to "
                "run; leave out --sessions, or take AgentNetBench, which has trajectories"
            )
        yield list(steps)


def part_of(step: int) -> str:
    """Returns the name of the part of a session that `step`, counted from 1, belongs to."""
    first, last = next((a, b) for a, b in STEPS if a <= step <= b)
    return f"steps {first:02}" + (" and later" if last == ALL_STEPS else f"-{last:02}")


class GuiSession:
    """Answers the steps of one trajectory in their order, on one cache.

    Every step is a turn with its screenshot. Before the next step, the demonstration's actions take
    the place of the model's reply, as in a prompt that shows earlier steps. So two budgets answer
    questions about the same conversation.

    Args:
        gui: the compiled model.
        history: how many of the newest screenshots stay in the cache.
    """

    def __init__(self, gui: GuiModel, history: int) -> None:
        self._gui, self._history = gui, history
        self._session: AgentSession | None = None
        self._before: Sample | None = None

    @torch.no_grad()
    def answer(self, sample: Sample, max_new_tokens: int) -> Answer:
        """Answers the next step greedily. `seconds` includes the processor's work.

        Raises:
            StarKVError: as `GuiModel.answer`, or the model or its template fits no session.
        """
        gui, screenshots = self._gui, list(sample.screens[-1:])
        if self._before is not None:
            screenshots.insert(0, self._before.screens[-1])
        pictures = [open_screen(screenshot) for screenshot in screenshots]
        screens = [gui.screen(picture.size) for picture in pictures]
        gui.check_size(pictures[-1])
        *earlier, turn = gui.family.turns(replace(sample, screens=screenshots), screens)
        if self._session is None:
            system = text_of(earlier[0]) if earlier else None
            self._session = AgentSession(gui.model, gui.processor, self._history, system=system)
        else:
            self._session.replace_reply(text_of(earlier[-1]))
        session, start = self._session, self._session.prompt_length
        content = [
            {**part, "image": pictures[-1]} if part["type"] == "image" else part
            for part in turn["content"]
        ]
        started = gui.now()
        said = session.step(content, max_new_tokens=max_new_tokens, do_sample=False)
        seconds = gui.now() - started
        self._before = sample
        ids = session.input_ids
        assert ids is not None
        [prompt] = gui.processor.batch_decode(self._once(ids[:, start : session.prompt_length]))
        decoded = ids.shape[1] - session.prompt_length - 1
        return Answer(prompt, said, screens[-1], **counts(session.cache, decoded), seconds=seconds)

    def _once(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns ids [1, L] with one token for each picture, as the chat template writes it."""
        image = getattr(self._gui.model.config, "image_token_id", -1)
        again = (ids[:, 1:] == image) & (ids[:, :-1] == image)
        return ids[torch.nn.functional.pad(~again, (1, 0), value=True)][None]

    def skip(self, sample: Sample) -> None:
        """Runs a step that was answered before, as later ones need its screenshot in the cache."""
        self.answer(sample, max_new_tokens=1)


def text_of(message: dict[str, Any]) -> str:
    """Returns the text of a message whose content is text, or parts of text."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)
