"""Keeps measured cells in a file, one JSON line each, so that an interrupted run can continue."""

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
    """Holds what one variant answered at one budget.

    options: every value of its `StarKVConfig`. right: [prompts, questions of each] bool, the right
    answers. same: [prompts, questions of each] bool, the answers that agree with the full cache in
    every token. kl: distance from the full cache's distribution in nats per token, for each way of
    asking. recall: share of the reply's attention to the prompt that goes to kept tokens; NaN where
    it was not recorded. nbytes, full_nbytes: bytes of all caches, kept and before compaction; for
    trajectories, summed over all steps. seconds: processor time of all prefills and compactions;
    for trajectories, of replies too.
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
    """Keeps the cells of one design and one agent in a folder.

    The first line of the file says what was measured and where. A folder with cells of another
    design raises an error, because those cells answer other questions.
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
                    f"{self.path} holds cells of another {name} (the file has {there.get(name)}, "
                    f"this run has {wanted.get(name)}); give another --out, or remove the file"
                )
        self.cells = {cell.key: cell for cell in cells}
        text = self.path.read_text()
        if not text.endswith("\n"):  # else the next line would be appended to half a one
            self.path.write_text(text[: text.rindex("\n") + 1])

    def has(self, variant: str, budget: float, config: StarKVConfig) -> bool:
        """Returns whether the file has the cell, measured with this configuration."""
        cell = self.cells.get((variant, budget))
        try:
            return cell is not None and StarKVConfig.from_options(cell.options) == config
        except OptionError:  # the option or its value no longer exists
            return False

    def add(self, cell: Cell) -> None:
        with self.path.open("a") as file:
            file.write(cell.to_line() + "\n")
        self.cells[cell.key] = cell


def read_cells(path: Path) -> tuple[dict[str, Any], list[Cell]]:
    """Returns the first line, and the cells in the order in which they were measured.

    Where several cells have the same key, the last one counts. A last line that an interruption
    cut off does not count.

    Raises:
        StarKVError: the file holds something else, or cannot be read.
    """
    try:
        lines = path.read_text().splitlines(keepends=True)
        head = json.loads(lines[0])
        cells = [Cell.from_line(line) for line in lines[1:] if line.endswith("\n")]
    except (OSError, ValueError, IndexError, TypeError, KeyError) as error:
        raise StarKVError(
            f"{path}: no file of measured cells ({error}); give a folder that `bench` wrote"
        ) from error
    return head, list({cell.key: cell for cell in cells}.values())
