"""The lengths that an engine is built for, and the shapes of a graph's inputs at them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from ...errors import StarKVError

PATCHES = (16, 4096, 16384)
"""Patches of one image: multiples of every tower's unit. The most are 3.2 megapixels at 14 x 14
pixels for each patch."""

Length = tuple[int, int, int]

WINDOWED: dict[str, Length] = {"merged": (4, 1024, 4096), "windows": (1, 80, 1024)}
"""Lengths of Qwen2.5-VL's tower. A merged patch has four patches, and a window has up to 64
patches. A strip that is two patches high has the most windows: 1,024."""

Shape = tuple[int, ...]


def lengths(max_seq: int, *, slots: int = 0, batch: int = 1) -> dict[str, Length]:
    """Least, usual and most of each length that `ports` names, for sessions of `max_seq` tokens.

    A profile has one range for each length. So an engine allocates memory for the largest prompt
    together with the largest number of stored tokens.

    Args:
        max_seq: most tokens of a session.
        slots: slots of a static cache; 0 for a dynamic one.
        batch: most rows.
    """
    quarter, half = max(2, max_seq // 4), max(2, max_seq // 2)
    most_stored = slots or max_seq
    return {
        "batch": (1, 1, batch),
        "new": (2, quarter, max_seq),
        "stored": (0, min(quarter, most_stored), most_stored),
        "seen": (2, half, max_seq),
        "budgeted": (2, half, max_seq),
        "on_frame": (2, max(2, max_seq // 8), max_seq),
        "patches": PATCHES,
        **WINDOWED,
    }


@dataclass(frozen=True)
class Profile:
    """Shapes of each input with a length that varies: at the least, the usual and the most."""

    least: dict[str, Shape]
    usual: dict[str, Shape]
    most: dict[str, Shape]


def profile(file: Path, ranges: Mapping[str, Length]) -> Profile:
    """Returns the profile of an exported graph. Its inputs name their lengths.

    Raises:
        StarKVError: an input has a length that is not in `ranges`.
    """
    found = Profile({}, {}, {})
    for port in onnx.load(str(file), load_external_data=False).graph.input:
        dims = [d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim]
        unknown = [d for d in dims if isinstance(d, str) and d not in ranges]
        if unknown:
            raise StarKVError(
                f"{file.name}: input {port.name} has a length {unknown[0]!r}, for which no range "
                f"is known (known: {', '.join(ranges)}); export again with this version"
            )
        if not any(isinstance(d, str) for d in dims):
            continue
        for i, shapes in enumerate((found.least, found.usual, found.most)):
            shapes[port.name] = tuple(ranges[d][i] if isinstance(d, str) else d for d in dims)
    return found


def trtexec(file: Path, shapes: Profile) -> str:
    """The command line that builds the same engine. Run it in the graph's folder."""
    options = [
        f"--onnx={file.name}",
        f"--saveEngine={file.with_suffix('.engine').name}",
        f"--minShapes={_listed(shapes.least)}",
        f"--optShapes={_listed(shapes.usual)}",
        f"--maxShapes={_listed(shapes.most)}",
        "--noTF32",
        "--skipInference",
    ]
    return " ".join(["trtexec", *options])


def _listed(shapes: Mapping[str, Shape]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
