"""Keeps answers in a folder, one JSON line each, so that an interrupted run can continue.

Each shard writes its own file, such as `answers-0-of-4.jsonl`. The first line holds the settings.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from starkv_compile import StarKVError

from .shards import Shard

PATTERN = "answers-*-of-*.jsonl"


class AnswerFile:
    """Holds the answers of one shard. The first answer creates the file.

    All files of a folder must have the same settings, because their answers are merged. The file
    also describes the machine, which may differ.

    Raises:
        StarKVError: a file of the folder has other settings, or a file or the folder cannot be read
            or written.
    """

    def __init__(
        self, folder: Path, shard: Shard, settings: dict[str, Any], machine: dict[str, Any]
    ) -> None:
        self.path = folder / f"answers-{shard.index}-of-{shard.count}.jsonl"
        self.done: set[str] = set()
        settings = {**settings, "shards": shard.count}
        self._head = {"settings": settings, "machine": machine}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob(PATTERN)):
                self._check(path, settings)
            if self.path.exists() and _cut(self.path):
                self.done = {record["id"] for record in read_answers(self.path)[1]}
        except OSError as error:
            raise StarKVError(
                f"{folder} cannot be the output folder ({error}); give another --out"
            ) from error

    def _check(self, path: Path, settings: dict[str, Any]) -> None:
        first = path.read_text().partition("\n")
        if not first[1]:
            return  # an interrupted first line: the file has no answers
        there, now = _head(path, first[0]), json.loads(json.dumps(settings))
        for name in sorted(there.keys() | now.keys()):
            if there.get(name) != now.get(name):
                raise StarKVError(
                    f"{path} was begun with {name}={there.get(name)!r}, now it is "
                    f"{now.get(name)!r}; give another --out, or remove the file"
                )

    def begin(self) -> None:
        """Creates the file, without answers, if it is not there."""
        self._append([])

    def add(self, record: dict[str, Any]) -> None:
        """Appends a record and waits until it is on the disk."""
        self._append([record])
        self.done.add(record["id"])

    def _append(self, records: list[dict[str, Any]]) -> None:
        with self.path.open("a") as file:
            for values in records if file.tell() else [self._head, *records]:
                file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_answers(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the settings, and the records in the order of the file.

    A last line that an interruption cut off does not count.

    Raises:
        StarKVError: the file holds something else. The message names the line.
    """
    lines = path.read_text().split("\n")[:-1]
    if not lines:
        raise StarKVError(f"{path}: it has no complete line; remove the file")
    settings = _head(path, lines[0])
    records = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            record = json.loads(line)
            str(record["id"]), float(record["score"]), dict(record["group"])
        except (ValueError, KeyError, TypeError) as error:
            raise StarKVError(
                f"{path}:{number}: no answer ({error}); remove the line or the file"
            ) from error
        records.append(record)
    return settings, records


def _head(path: Path, line: str) -> dict[str, Any]:
    try:
        return {"sessions": False, **json.loads(line)["settings"]}
    except (ValueError, KeyError, TypeError) as error:
        raise StarKVError(
            f"{path}:1: no settings of `bench gui` ({error}); remove the file"
        ) from error


def _cut(path: Path) -> bool:
    """Removes an incomplete last line. Returns whether the file still has a line."""
    whole = path.read_bytes().rpartition(b"\n")
    if whole[2]:
        path.write_bytes(whole[0] + whole[1])
    return bool(whole[1])
