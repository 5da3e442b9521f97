"""Reads AndroidControl, which asks for the next step on a phone (arXiv 2406.03679).

The folder holds one of two forms:

* The published form (google-research, `gs://gresearch/android_control`): `android_control-*-of-*`,
  gzipped TFRecords with one episode each, `splits.json` and `test_subsplits.json`. The reader takes
  the steps of the test split.
* `500_steps.json`: a list of records, and the screenshots that they name. UGround (arXiv
  2410.05243) drew these 500 steps, and later papers use them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from starkv_compile import StarKVError

from .actions import DIRECTIONS, Action, Point
from .android_screen import Element, element_at, elements_of_forest, elements_of_json
from .boxes import contains
from .files import Record, must_exist, read_object, read_objects
from .samples import Dataset, Past, Reading, Sample, Size
from .wire import message, messages, numbers, parse, read_records, string

SAMPLE = "500_steps.json"
PARTS = ("IDD", "app_unseen", "task_unseen", "category_unseen")  # parts of the test split
TEXTS = ("type", "type_text", "input_text")
KINDS = {
    "click": "click",
    "long_press": "long_press",
    "scroll": "scroll",
    "open_app": "open_app",
    "navigate_home": "home",
    "navigate_back": "back",
    "wait": "wait",
    "status": "finish",
    **dict.fromkeys(TEXTS, "type"),
}
"""Our action kind for each action type of the data set."""


def read(folder: Path, reading: Reading) -> Iterator[Sample]:
    """Yields the steps in the order of the files.

    It reads TFRecords one at a time, so an error in a late record comes late.

    Raises:
        StarKVError: a file is missing, or a record is malformed.
    """
    if (folder / SAMPLE).exists():
        yield from [_of_json(folder, record, reading) for record in read_objects(folder / SAMPLE)]
        return
    paths = sorted(folder.glob("android_control-*-of-*"))
    if not paths:
        raise StarKVError(
            f"{folder}: neither {SAMPLE} nor android_control-*-of-* is here; give the folder of "
            "one form"
        )
    wanted = set(_episodes(folder / "splits.json", "test"))
    unseen = {name: set(_episodes(folder / "test_subsplits.json", name)) for name in PARTS}
    for path in paths:
        for where, data in read_records(path):
            yield from _checked_episode(where, data, wanted, unseen, reading)


def _episodes(path: Path, name: str) -> list[int]:
    return list(read_object(must_exist(path, "download it with the TFRecords")).get(name, list))


def _of_json(folder: Path, record: Record, reading: Reading) -> Sample:
    episode, step = record.get("episode_id", int), record.get("step", int)
    screen = folder / record.text("screenshot")
    must_exist(screen, f"{record.where} names it")
    elements = list(elements_of_json(record))
    return Sample(
        id=f"{episode}-{step}",
        setting="phone",
        instruction=record.text("goal" if reading.level == "high" else "step_instruction"),
        screens=(screen,),
        target=_target(record.part("action"), elements),
        group={"action": record.part("action").text("action_type")},
        past=_past(record.get("previous_actions", list), reading),
    )


def _checked_episode(where: str, data: bytes, *choice: Any) -> list[Sample]:
    try:
        return list(_of_episode(where, data, *choice))
    except ValueError as error:
        raise StarKVError(
            f"{where}: no episode of AndroidControl ({error}); download the file again"
        ) from error


def _of_episode(
    where: str,
    data: bytes,
    wanted: set[int],
    unseen: Mapping[str, set[int]],
    reading: Reading,
) -> Iterator[Sample]:
    features = _features(data)
    episode = _one(numbers(message(features["episode_id"], 3), 1), "episode_id")
    if episode not in wanted:
        return
    goal, *_ = _texts(features, "goal")
    actions = [json.loads(text) for text in _texts(features, "actions")]
    said = _texts(features, "step_instructions")
    shots, trees = _bytes(features, "screenshots"), _bytes(features, "accessibility_trees")
    if not len(shots) - 1 == len(trees) - 1 == len(actions) == len(said):
        raise ValueError(
            f"{len(shots)} screenshots, {len(trees)} trees, {len(actions)} actions and "
            f"{len(said)} instructions do not fit; expected one more screenshot and tree"
        )
    parts = [name for name, episodes in unseen.items() if episode in episodes]
    for step, action in enumerate(actions):
        if not isinstance(action, dict):
            raise ValueError(f"action {step} is {action!r}; expected an object")
        record = Record(f"{where}, step {step}", action)
        elements = elements_of_forest(trees[step])
        yield Sample(
            id=f"{episode}-{step}",
            setting="phone",
            instruction=goal if reading.level == "high" else said[step],
            screens=(shots[step],),
            target=_target(record, elements),
            group={"action": record.text("action_type"), **{part: part for part in parts}},
            past=_past(said[:step], reading),
        )


def _past(said: Sequence[str], reading: Reading) -> tuple[Past, ...]:
    """Returns the earlier steps in words. A question about a low-level step has none."""
    if reading.level == "low" or not reading.texts:
        return ()
    return tuple(Past(str(step)) for step in said[-reading.texts :])


def _target(action: Record, elements: Sequence[Element]) -> dict[str, Any]:
    name = action.text("action_type")
    if name not in KINDS:
        raise StarKVError(
            f"{action.where}: action_type {name!r}: expected one of {', '.join(KINDS)}"
        )
    kind = KINDS[name]
    target: dict[str, Any] = {"kind": kind}
    if kind in ("click", "long_press") or (kind == "type" and "x" in action.values):
        point = (action.number("x"), action.number("y"))
        target |= {"point": list(point), "element": _at(elements, point)}
    if kind == "type":
        target["text"] = action.text("text")
    elif kind == "open_app":
        target["text"] = action.text("app_name")
    elif kind == "scroll":
        target["direction"] = action.text("direction")
        if target["direction"] not in DIRECTIONS:
            raise StarKVError(
                f"{action.where}: scroll to {target['direction']!r}: expected "
                f"{', '.join(DIRECTIONS)}"
            )
    if kind in ("open_app", "back"):  # a click may do the same
        target["elements"] = [element.to_json() for element in elements]
    return target


def _at(elements: Sequence[Element], point: Point) -> dict[str, Any] | None:
    element = element_at(elements, point)
    return None if element is None else element.to_json()


def score(target: Mapping[str, Any], actions: Sequence[Action], size: Size) -> float:
    """Returns 1 if the action's type and all its arguments are right, else 0.

    Source: the paper, D.3, and UGround's code. A point is right inside the smallest element that
    holds the demonstration's point. A click on an element with the app's name equals opening the
    app, and a click on "back" equals going back; the reverse holds too. Text has to be the same.
    A point of typed text counts only if the answer gives one.
    """
    if len(actions) != 1:
        return 0.0
    action, kind = actions[0], target["kind"]
    if action.kind == kind:
        return float(_same_arguments(action, target))
    if action.kind == "click" and action.point and kind in ("open_app", "back"):
        there = element_at([Element(**values) for values in target["elements"]], action.point)
        return float(_stands_for(there, kind, target.get("text")))
    if action.kind in ("open_app", "back") and kind == "click":
        there = target["element"] and Element(**target["element"])
        return float(_stands_for(there, action.kind, action.text))
    return 0.0


def _same_arguments(action: Action, target: Mapping[str, Any]) -> bool:
    if action.kind in ("type", "open_app") and action.text != target["text"]:
        return False
    if action.kind == "scroll":
        return action.direction == target["direction"]
    if "point" not in target or action.point is None:
        return True
    element = target["element"]
    return element is not None and contains(element["box"], action.point)


def _stands_for(clicked: Element | None, kind: str, app: str | None) -> bool:
    """Whether a click on that element does the same as `kind`, for the app if `kind` opens one."""
    name = (app or "").lower() if kind == "open_app" else "back"
    return clicked is not None and bool(name) and name in clicked.label


def _features(data: bytes) -> dict[str, Any]:
    """Returns each Feature of a tf.train.Example by its name."""
    entries = messages(message(parse(data), 1), 1)
    found = {string(entry, 1): message(entry, 2) for entry in entries}
    for name in (
        "episode_id",
        "goal",
        "screenshots",
        "accessibility_trees",
        "actions",
        "step_instructions",
    ):
        if name not in found:
            raise ValueError(f"it has no {name!r}")
    return found


def _bytes(features: Mapping[str, Any], name: str) -> list[bytes]:
    return [value for value in message(features[name], 1).get(1, []) if isinstance(value, bytes)]


def _texts(features: Mapping[str, Any], name: str) -> list[str]:
    return [value.decode() for value in _bytes(features, name)]


def _one(values: Sequence[int], name: str) -> int:
    if len(values) != 1:
        raise ValueError(f"{len(values)} values of {name!r}; expected one")
    return values[0]


ANDROID_CONTROL = Dataset(
    "androidcontrol",
    "AndroidControl",
    read,
    score,
    files=(SAMPLE, "android_control-*-of-*", "splits.json", "test_subsplits.json"),
    tables=(("action",), *((part,) for part in PARTS)),
    tokens=256,
    source="gs://gresearch/android_control, or the 500 steps of OSU-NLP-Group/UGround (GitHub)",
)
