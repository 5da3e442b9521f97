"""Reads ScreenSpot-v2, which asks for one element of a screenshot.

Source: `OS-Copilot/ScreenSpot-v2` on Hugging Face (OS-Atlas, arXiv 2410.23218). The folder has
`screenspotv2_image/`, and three lists of records {"img_filename", "bbox": [x, y, width, height] in
pixels, "instruction", "data_type": text or icon, "data_source"}.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .actions import Action
from .boxes import hit
from .files import must_exist, read_objects
from .samples import Dataset, Reading, Sample, Size

PLATFORMS = ("mobile", "desktop", "web")
IMAGES = "screenspotv2_image"
SOURCE = "OS-Copilot/ScreenSpot-v2 from Hugging Face"


def read(folder: Path, reading: Reading) -> Iterator[Sample]:
    """Yields the samples of the three platforms, after it checked all records.

    Raises:
        StarKVError: a file is missing, or a record is malformed.
    """
    samples = []
    for platform in PLATFORMS:
        path = folder / f"screenspot_{platform}_v2.json"
        must_exist(path, f"download {SOURCE}")
        for number, record in enumerate(read_objects(path)):
            left, top, width, height = record.numbers("bbox", 4)
            image = folder / IMAGES / record.text("img_filename")
            must_exist(image, f"{record.where} names it; unpack screenspotv2_image.zip")
            sample = Sample(
                id=f"{platform}-{number}",
                setting="point",
                instruction=record.text("instruction"),
                screens=(image,),
                target={"box": [left, top, left + width, top + height]},
                group={
                    "platform": platform,
                    "type": record.text("data_type"),
                    "source": record.text("data_source"),
                },
            )
            samples.append(sample)
    yield from samples


def score(target: dict[str, list[float]], actions: Sequence[Action], size: Size) -> float:
    """Returns 1 if the answer's point is in the box, edges included, else 0."""
    return float(hit(target["box"], actions))


SCREENSPOT_V2 = Dataset(
    "screenspot-v2",
    "ScreenSpot-v2",
    read,
    score,
    files=("screenspot_*_v2.json",),
    tables=(("platform", "type"), ("type",), ("source",)),
    tokens=256,
    source=SOURCE,
)
