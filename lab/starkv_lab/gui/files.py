"""Reads published JSON files. An error names the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starkv_compile import StarKVError

_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Record:
    """Holds an object of a file, and its place ("file:line")."""

    where: str
    values: dict[str, Any]

    def get(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """Returns the value of `name`.

        Raises:
            StarKVError: the record has no such value, or a value of another type.
        """
        if name not in self.values:
            raise StarKVError(f"{self.where}: the record has no {name!r}")
        value = self.values[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise StarKVError(f"{self.where}: {name!r} is {_short(value)}")
        return value

    def text(self, name: str) -> str:
        return self.get(name, str)

    def number(self, name: str) -> float:
        """Returns a finite number."""
        value = self.get(name, (int, float))
        if not _is_number(value):
            raise StarKVError(f"{self.where}: {name!r} is {value}; expected a finite number")
        return float(value)

    def numbers(self, name: str, count: int) -> list[float]:
        """Returns a list of `count` finite numbers."""
        values = self.get(name, list)
        if len(values) != count or not all(_is_number(value) for value in values):
            raise StarKVError(f"{self.where}: {name!r} is {_short(values)}, not {count} numbers")
        return [float(value) for value in values]

    def part(self, name: str) -> Record:
        return Record(self.where, self.get(name, dict))

    def parts(self, name: str) -> list[Record]:
        """Returns a list of objects."""
        values = self.get(name, list)
        if not all(isinstance(value, dict) for value in values):
            raise StarKVError(f"{self.where}: {name!r} is not a list of objects")
        return [Record(self.where, value) for value in values]


def read_object(path: Path) -> Record:
    """Reads a file that holds one object.

    Raises:
        StarKVError: the file is missing, is no JSON, or holds no object.
    """
    text = _read(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise StarKVError(f"{path}:{error.lineno}: no JSON ({error.msg})") from error
    return _record(path, text, 0, value)


def read_objects(path: Path) -> Iterator[Record]:
    """Yields the objects of a file that holds a list of them.

    Raises:
        StarKVError: the file is missing, is no JSON, or holds no list of objects.
    """
    text = _read(path)
    place = _skip(text, 0)
    if text[place : place + 1] != "[":
        raise StarKVError(f"{path}:{_line(text, place)}: expected a list of records")
    place = _skip(text, place + 1)
    while text[place : place + 1] != "]":
        try:
            value, end = _DECODER.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise StarKVError(f"{path}:{error.lineno}: no JSON ({error.msg})") from error
        yield _record(path, text, place, value)
        place = _skip(text, end)
        if text[place : place + 1] == ",":
            place = _skip(text, place + 1)
        elif text[place : place + 1] != "]":
            raise StarKVError(f"{path}:{_line(text, place)}: the list of records does not end")


def must_exist(path: Path, hint: str) -> Path:
    """Returns `path` if there is such a file or folder.

    Raises:
        StarKVError: there is none. `hint` says where the file comes from.
    """
    if not path.exists():
        raise StarKVError(f"{path}: there is no such file or folder; {hint}")
    return path


def _record(path: Path, text: str, place: int, value: Any) -> Record:
    where = f"{path}:{_line(text, place)}"
    if not isinstance(value, dict):
        raise StarKVError(f"{where}: {_short(value)} is no record; expected an object")
    return Record(where, value)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StarKVError(f"{path}: cannot be read ({error})") from error


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n\ufeff":
        place += 1
    return place


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def _is_number(value: object) -> bool:
    finite = isinstance(value, (int, float)) and abs(value) < float("inf")
    return finite and not isinstance(value, bool)


def _short(value: object) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:57]}..."
