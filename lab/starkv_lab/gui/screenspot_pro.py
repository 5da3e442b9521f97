"""Reads ScreenSpot-Pro, which asks for one element of a large desktop screenshot.

Source: `likaixin/ScreenSpot-Pro` on Hugging Face (arXiv 2504.07981). The folder has `images/`, and
in `annotations/*.json` a list of records for each application: {"id", "img_filename", "bbox":
[left, top, right, bottom] in pixels of "img_size" [width, height], "instruction", "instruction_cn",
"application", "platform", "group", "ui_type": text or icon}.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from starkv_compile import StarKVError

from .actions import Action
from .boxes import hit
from .files import must_exist, read_objects
from .samples import Dataset, Reading, Sample, Size

SOURCE = "likaixin/ScreenSpot-Pro from Hugging Face"


def read(folder: Path, reading: Reading) -> Iterator[Sample]:
    """Yields the English instructions of all applications, after it checked all records.

    Raises:
        StarKVError: a file is missing, or a record is malformed.
    """
    annotations = must_exist(folder / "annotations", f"download {SOURCE}")
    paths = sorted(annotations.glob("*.json"))
    if not paths:
        raise StarKVError(f"{annotations}: no .json files here; download {SOURCE}")
    samples = []
    for path in paths:
        for number, record in enumerate(read_objects(path)):
            image = folder / "images" / record.text("img_filename")
            must_exist(image, f"{record.where} names it")
            size = record.numbers("img_size", 2)
            if min(size) <= 0:
                raise StarKVError(f"{record.where}: 'img_size' is {size}; expected numbers above 0")
            sample = Sample(
                id=f"{path.stem}-{number}",
                setting="point",
                instruction=record.text("instruction"),
                screens=(image,),
                target={"box": record.numbers("bbox", 4), "of": size},
                group={
                    "group": record.text("group"),
                    "type": record.text("ui_type"),
                    "application": record.text("application"),
                    "platform": record.text("platform"),
                },
            )
            samples.append(sample)
    yield from samples


def score(target: dict[str, Any], actions: Sequence[Action], size: Size) -> float:
    """Returns 1 if the answer's point is in the box, edges included, as shares of their screens."""
    x, y = size[0] / target["of"][0], size[1] / target["of"][1]
    left, top, right, bottom = target["box"]
    return float(hit([left * x, top * y, right * x, bottom * y], actions))


SCREENSPOT_PRO = Dataset(
    "screenspot-pro",
    "ScreenSpot-Pro",
    read,
    score,
    files=("annotations/*.json",),
    tables=(("group", "type"), ("type",), ("application",), ("platform",)),
    tokens=256,
    source=SOURCE,
)
