"""Reads AgentNetBench, which asks for the next step of a desktop trajectory.

Source: OpenCUA, arXiv 2508.09123. The folder has a file `TASK.json` for each trajectory, and
`images/`. A file holds {"task_id", "high_level_task_description", "steps": [{"image",
"inner_monologue", "ground_truth_actions", "alternative_options"}]}. Positions are shares of the
screenshot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from starkv_compile import StarKVError

from .actions import Action, Point
from .agentnet_score import best, keys_of, scroll_of
from .files import Record, must_exist, read_object
from .samples import Dataset, Past, Reading, Sample, Size

KINDS = {
    "click": "click",
    "doubleclick": "double_click",
    "rightclick": "right_click",
    "tripleclick": "triple_click",
    "middleclick": "middle_click",
    "moveto": "move",
    "dragto": "drag_to",
    "write": "type",
    "press": "press",
    "hotkey": "hotkey",
    "scroll": "scroll",
    "terminate": "finish",
}
"""Our action kind for each action type of the data set, in lower case."""


def read(folder: Path, reading: Reading) -> Iterator[Sample]:
    """Yields all steps of all trajectories, after it checked all records.

    Raises:
        StarKVError: a file is missing, or a record is malformed.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise StarKVError(f"{folder}: no trajectories (*.json) here; AgentNetBench has them")
    yield from [sample for path in paths for sample in _of_trajectory(path, reading)]


def _of_trajectory(path: Path, reading: Reading) -> Iterator[Sample]:
    trajectory = read_object(path)
    task, goal = trajectory.text("task_id"), trajectory.text("high_level_task_description")
    steps = trajectory.parts("steps")
    steps = [Record(f"{path}: step {number}", step.values) for number, step in enumerate(steps)]
    screens = []
    for step in steps:
        screen = path.parent / "images" / step.text("image")
        must_exist(screen, f"{step.where} names it")
        screens.append(screen)
    past = [Past(_said(step), partial(actions_of, step.values)) for step in steps]
    for number, step in enumerate(steps):
        options = [_checked(step.where, step.get("ground_truth_actions", list))]
        others = step.values.get("alternative_options") or []
        options += [_checked(step.where, option) for option in others]
        told = past[max(0, number - reading.texts) : number]
        shown = min(len(told), reading.images - 1)
        yield Sample(
            id=f"{task}-{number}",
            setting="desktop",
            instruction=goal,
            screens=screens[number - shown : number + 1],
            target=options,
            group={"action": options[0][0]["type"]},
            past=told,
            trajectory=task,
        )


def _said(step: Record) -> str:
    thought = step.values.get("inner_monologue")
    said = thought.get("low_level_instruction") if isinstance(thought, dict) else None
    return said if isinstance(said, str) else ""


def _checked(where: str, option: Any) -> list[dict[str, Any]]:
    """Checks that all types of the actions are known and no position is missing."""
    if not isinstance(option, list) or not option:
        raise StarKVError(
            f"{where}: no list of actions, but {option!r}; expected at least one action"
        )
    for values in option:
        if not isinstance(values, dict):
            raise StarKVError(
                f"{where}: {values!r} is no action; expected an object with type and params"
            )
        action = Record(where, values)
        kind = action.text("type").lower()
        if kind not in KINDS:
            raise StarKVError(
                f"{where}: type {values['type']!r}: expected one of {', '.join(KINDS)}"
            )
        params = action.part("params")
        if kind.endswith(("click", "to")):
            for axis in ("x", "y"):
                params.part("position").number(axis)
            known = {"bboxes": [], **(values.get("metadata") or {})}
            for box in Record(where, known).parts("bboxes"):
                box.numbers("rel_bbox", 4)
        elif kind == "write":
            params.text("text" if "text" in params.values else "content")
        elif kind in ("press", "hotkey"):
            if not params.get("keys", (list, str)):
                raise StarKVError(f"{where}: {values['type']} without a key; expected one or more")
        elif kind == "scroll":
            for name in ("amount", "pixels"):
                if name in params.values:
                    params.number(name)
    return option


def actions_of(step: dict[str, Any], size: Size) -> tuple[Action, ...]:
    """Returns the demonstration's actions in a step, in pixels of a screenshot of that size."""
    return tuple(_action(values, size) for values in step["ground_truth_actions"])


def _action(values: dict[str, Any], size: Size) -> Action:
    kind, params = KINDS[values["type"].lower()], values["params"]
    position = params.get("position")
    point: Point | None = None
    if position is not None:
        point = position["x"] * size[0], position["y"] * size[1]
    if kind == "type":
        return Action(kind, text=params.get("text") or params.get("content") or "")
    if kind in ("press", "hotkey"):
        return Action(kind, keys=tuple(keys_of(params)))
    if kind == "scroll":
        sign, amount = scroll_of(params)
        return Action(kind, point, direction="up" if sign > 0 else "down", amount=amount)
    if kind == "finish":
        return Action(kind, text=params.get("status", "success"))
    return Action(kind, point)


def score(target: Sequence[Any], actions: Sequence[Action], size: Size) -> float:
    """Returns the best score, 0 to 1, against the demonstration and its alternatives."""
    return best(target, actions, size)


AGENTNET_BENCH = Dataset(
    "agentnetbench",
    "AgentNetBench",
    read,
    score,
    files=("*.json",),
    tables=(("action",),),
    tokens=512,
    source="AgentNetBench of xlang-ai/OpenCUA (GitHub, evaluation/agentnetbench)",
)
