"""Measured cells in a file, one JSON line each: a run that was interrupted goes on from it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from starkv_compile import OptionError, StarKVConfig, StarKVError

from .design import COLUMNS, AnyDesign


@dataclass(frozen=True, eq=False)
class Cell:
    """A variant at a budget. options: every value of its `StarKVConfig`.

    right, same: [prompts, questions of each] bool, answers that are right, and those whose every
    token is also the full cache's choice. kl: nats a token from the full cache's distribution, by
    way of asking. recall: share of the reply's attention to the prompt that is still there; not a
    number where it was not recorded. nbytes, full_nbytes: of all prompts' caches, kept and before,
    of trajectories after every step. seconds: of processors, for all prefills and compactions, of
    trajectories for replies too.
    """

    variant: str
    budget: float
    options: dict[str, Any]
    right: np.ndarray
    same: np.ndarray
    kl: dict[str, float]
    recall: float
    nbytes: int
    full_nbytes: int
    seconds: float

    @property
    def key(self) -> tuple[str, float]:
        return self.variant, self.budget

    def to_line(self) -> str:
        values = {**dataclasses.asdict(self), "shape": self.right.shape}
        for name in ("right", "same"):
            values[name] = np.packbits(values[name]).tobytes().hex()
        return json.dumps(values)

    @classmethod
    def from_line(cls, line: str) -> Cell:
        values = json.loads(line)
        shape = values.pop("shape", (-1, len(COLUMNS)))
        for name in ("right", "same"):
            packed = np.frombuffer(bytes.fromhex(values[name]), np.uint8)
            bits = np.unpackbits(packed, count=None if shape[0] < 0 else shape[0] * shape[1])
            values[name] = bits.astype(bool).reshape(shape)
        return cls(**values)


class CellFile:
    """The cells of one design and one agent in a folder.

    The first line says what was measured and where. Opening a folder of another design is refused:
    its cells answer other questions.
    """

    def __init__(self, folder: Path, design: AnyDesign, where: dict[str, Any]) -> None:
        self.path, self.design = folder / design.file, design
        self.cells: dict[tuple[str, float], Cell] = {}
        head = {"design": dataclasses.asdict(design), **where}  # type: ignore[call-overload]
        if self.path.exists():
            self._resume(head)
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(head) + "\n")

    def _resume(self, head: dict[str, Any]) -> None:
        there, cells = read_cells(self.path)
        wanted = json.loads(json.dumps(head))
        for name in ("design", "agent"):
            if there.get(name) != wanted.get(name):
                raise StarKVError(
                    f"{self.path} holds cells of another {name} ({there.get(name)}, now "
                    f"{wanted.get(name)}); give another --out, or remove the file"
                )
        self.cells = {cell.key: cell for cell in cells}
        text = self.path.read_text()
        if not text.endswith("\n"):  # else the next line would be appended to half a one
            self.path.write_text(text[: text.rindex("\n") + 1])

    def has(self, variant: str, budget: float, config: StarKVConfig) -> bool:
        """Whether the cell was measured with this very configuration."""
        cell = self.cells.get((variant, budget))
        try:
            return cell is not None and StarKVConfig.from_options(cell.options) == config
        except OptionError:  # an option or a value of it that is no more
            return False

    def add(self, cell: Cell) -> None:
        with self.path.open("a") as file:
            file.write(cell.to_line() + "\n")
        self.cells[cell.key] = cell


def read_cells(path: Path) -> tuple[dict[str, Any], list[Cell]]:
    """(first line, cells in the order measured; the last of several with one key counts).

    A last line cut off by an interruption is left out.

    Raises:
        StarKVError: it is no such file.
    """
    try:
        lines = path.read_text().splitlines(keepends=True)
        head = json.loads(lines[0])
        cells = [Cell.from_line(line) for line in lines[1:] if line.endswith("\n")]
    except (OSError, ValueError, IndexError, TypeError, KeyError) as error:
        raise StarKVError(f"{path}: no file of measured cells ({error})") from error
    return head, list({cell.key: cell for cell in cells}.values())
