"""`export.json`: everything that a server of the graphs needs to know."""

from __future__ import annotations

import dataclasses
import json
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...config import StarKVConfig
from ...errors import OptionError, StarKVError
from ..capture.ports import Layer, Port, Shapes, decode_ports, prefill_ports

FILE = "export.json"
FORMAT = 4


@dataclass(frozen=True)
class Manifest:
    """What was exported, how, and with which versions."""

    model_class: str
    shapes: Shapes
    config: StarKVConfig
    max_seq: int
    opset: int
    select: str
    visual: bool

    def write(self, folder: Path) -> None:
        fraction = self.config.fraction
        tokens = self.config.budget_tokens
        rule = f"budgeted * {fraction.numerator} // {fraction.denominator}"
        described = {
            "format": FORMAT,
            "model_class": self.model_class,
            "opset": self.opset,
            "max_seq": self.max_seq,
            "cache": "static" if self.shapes.slots else "dynamic",
            "slots": self.shapes.slots,
            "config": self.config.to_options(),
            "capacity": rule if tokens is None else str(tokens),
            "window": f"max(1, min({self.config.window}, new, capacity - 2, stored + new - 1))",
            "kept": "max(1, min(capacity - window, stored + new - window)) + window",
            "select": self.select,
            "visual": self.visual,
            "shapes": {**dataclasses.asdict(self.shapes), "dtype": str(self.shapes.dtype)[6:]},
            "graphs": {
                name: {"inputs": _described(ports.inputs), "outputs": _described(ports.outputs)}
                for name, ports in (
                    ("prefill.onnx", prefill_ports(self.shapes)),
                    ("decode.onnx", decode_ports(self.shapes)),
                )
            },
            "versions": _versions(),
        }
        (folder / FILE).write_text(json.dumps(described, indent=1) + "\n")

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether an export was written to the folder."""
        return (folder / FILE).is_file()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads what `write` wrote to a folder.

        Raises:
            StarKVError: there is no export, or it has another format or unknown options.
        """
        try:
            found = json.loads((folder / FILE).read_text())
        except (OSError, ValueError) as error:
            raise StarKVError(
                f"{folder}: there is no export ({error}); make one with `starkv "
                f"export CHECKPOINT -o {folder}`"
            ) from error
        if found.get("format") != FORMAT:
            raise StarKVError(
                f"{folder}: {FILE} has format {found.get('format')!r}, but this version reads "
                f"{FORMAT}; export again"
            )
        try:
            config = StarKVConfig.from_options(found["config"])
        except OptionError as error:
            raise StarKVError(
                f"{folder}: it has options that this version does not know ({error}); export again"
            ) from error
        shapes = found["shapes"]
        shapes["layers"] = tuple(Layer(**layer) for layer in shapes["layers"])
        shapes["dtype"] = getattr(torch, shapes["dtype"])
        return cls(
            model_class=found["model_class"],
            shapes=Shapes(**shapes),
            config=config,
            max_seq=found["max_seq"],
            opset=found["opset"],
            select=found["select"],
            visual=found["visual"],
        )


def _described(ports: list[Port]) -> list[dict[str, Any]]:
    return [port.described() for port in ports]


def _versions() -> dict[str, str]:
    names = ("starkv-compile", "torch", "transformers", "onnx", "onnxscript")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
