"""Writes an `Inspection` as one HTML file, which needs no network and no other file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch
from PIL import Image

from starkv_compile import StarKVConfig

from .collect import Budget, Inspection
from .prompt import Picture

MAX_WIDTH = 1600  # pixels of a picture in the page
MAX_PNG = 300_000  # bytes; a larger one is stored as JPEG
SCRIPTS = (
    "data.js",  # first: the others name what it unpacks
    "kept.js",
    "words.js",
    "pictures.js",
    "parts.js",
    "address.js",
    "events.js",  # last: it draws
)
QUALITY = 85  # of that JPEG


def render(inspection: Inspection, replies: Sequence[str] = ()) -> str:
    """Makes the page from the files in `html/`. `replies` come from `replies.replies`."""
    page, style = _file("page.html"), _file("page.css")
    script = "\n".join(map(_file, SCRIPTS))
    # No text of a prompt can end the element that holds the data.
    data = json.dumps(page_data(inspection, replies), separators=(",", ":")).replace("<", "\\u003c")
    for name, part in (("STYLE", style), ("SCRIPT", script), ("DATA", data)):
        page = page.replace(f"/*{name}*/", part)
    return page


def _file(name: str) -> str:
    return (files(__package__) / "html" / name).read_text(encoding="utf-8")


def _options(config: StarKVConfig) -> dict[str, Any]:
    """The options that differ from their defaults, those of the policy too."""
    own = {name: value for name, value in config.to_options().items() if name != "policy"}
    return own | config.policy.changed_options()


def page_data(inspection: Inspection, replies: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the data that the page's scripts read. Arrays are packed by `packed`."""
    prompt = inspection.prompt
    budgets, rankings = _budgets(inspection)
    visual = inspection.frame >= 0
    return {
        "model": prompt.model_name,
        "policy": inspection.config.policy.name,
        "options": _options(inspection.config),
        "text": prompt.text,
        "answer": prompt.asked.answer if prompt.asked else None,
        "replies": [
            {"text": reply, "isRight": prompt.asked.is_right(reply) if prompt.asked else None}
            for reply in replies
        ],
        "words": ["" if seen else word for word, seen in zip(prompt.words(), visual, strict=True)],
        "frame": packed(inspection.frame + 1),  # 0 for text
        "row": packed(inspection.row),
        "column": packed(inspection.column),
        "frames": _frames(inspection),
        "layers": inspection.layers,
        "fullBytes": [len(visual) * layer.full for layer in inspection.token_bytes],
        "heads": inspection.budgets[0].ranks.shape[1],
        "budgets": budgets,
        "rankings": rankings,
        "axes": [
            {
                "name": axis.name,
                "title": axis.title,
                "about": axis.about,
                "isFactor": axis.is_factor,
                "values": packed(axis.values),
            }
            for axis in inspection.axes
        ],
    }


def _budgets(inspection: Inspection) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the budgets, and the rankings that they refer to.

    All budgets share one ranking, unless the scores depend on the budget. A ranking lists the
    tokens of each layer and head, best first. A single ranking lists all tokens. Several list only
    the kept tokens, because the page would be too large otherwise.
    """
    distinct: list[list[Budget]] = []
    budgets = inspection.budgets
    for budget in budgets:
        same = (group for group in distinct if torch.equal(group[0].ranks, budget.ranks))
        group = next(same, None)
        if group is None:
            distinct.append([budget])
        else:
            group.append(budget)
    shown = [
        {
            "percent": round(100 * budget.share, 6),
            "ranking": number,
            "kept": budget.kept,
            "window": budget.window,
            "bytes": [inspection.nbytes(budget, layer) for layer in range(len(budget.kept))],
        }
        for number, group in enumerate(distinct)
        for budget in group
    ]
    rankings = []
    for group in distinct:
        ranks = group[0].ranks
        most = [max(kept) for kept in zip(*(budget.kept for budget in group), strict=True)]
        listed = [ranks.shape[2]] * len(ranks) if len(distinct) == 1 else most
        order = [layer.argsort()[:, :count] for layer, count in zip(ranks, listed, strict=True)]
        places = torch.cat([layer.flatten() for layer in order])
        rankings.append({"listed": listed, "order": packed(places)})
    return sorted(shown, key=lambda budget: -budget["percent"]), rankings


def _frames(inspection: Inspection) -> list[dict[str, Any]]:
    """Returns the grid of each frame, and its picture where pictures and frames correspond."""
    pictures = inspection.prompt.pictures
    count = int(inspection.frame.max()) + 1
    frames = []
    for number in range(count):
        here = inspection.frame == number
        rows, columns = (int(t[here].max()) + 1 for t in (inspection.row, inspection.column))
        # A processor may cut a picture into tiles. Each is a frame, and nobody knows its place.
        picture = pictures[number] if count == len(pictures) else None
        frames.append({"rows": rows, "columns": columns, **_shown(picture, number)})
    return frames


def _shown(picture: Picture | None, number: int) -> dict[str, Any]:
    if picture is None:
        return {"title": f"frame {number + 1}", "image": None, "size": None, "needed": []}
    return {
        "title": picture.title,
        "image": data_uri(picture.image),
        "size": picture.image.size,
        "needed": sorted(picture.needed),
    }


def data_uri(image: Image.Image) -> str:
    """Encodes the picture, at most `MAX_WIDTH` wide: as PNG, or as JPEG where that is too large."""
    if image.width > MAX_WIDTH:
        size = (MAX_WIDTH, round(image.height * MAX_WIDTH / image.width))
        image = image.resize(size, Image.Resampling.LANCZOS)
    kind, file = "png", io.BytesIO()
    image.save(file, "PNG")
    if file.tell() > MAX_PNG:
        kind, file = "jpeg", io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY)
    return f"data:image/{kind};base64,{_base64(file.getvalue())}"


def packed(values: torch.Tensor) -> dict[str, str]:
    """Packs values as little-endian bytes in base64, with the name of their type.

    Whole numbers become u16 or u32. Scores become bf16, the upper half of a float32, which keeps
    two to three digits in two bytes.
    """
    if values.is_floating_point():
        return {"type": "bf16", "bytes": _bytes(values.bfloat16().view(torch.uint16))}
    wide = values.numel() > 0 and int(values.max()) >= 1 << 16
    kind = torch.uint32 if wide else torch.uint16
    return {"type": "u32" if wide else "u16", "bytes": _bytes(values.to(kind))}


def _bytes(values: torch.Tensor) -> str:
    array = values.contiguous().numpy()
    return _base64(array.astype(array.dtype.newbyteorder("<")).tobytes())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
