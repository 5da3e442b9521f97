"""Draws which cells of each screenshot (a column) each layer (a row) keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from ..agent.render import CELL
from ..agent.world import Cell
from .kept import LayerKept

MAX_WIDTH = 2400  # pixels
MIN_COLUMN = 250  # pixels: the titles of a column fit into it
MARGIN, GAP, TITLE, ROW_TITLE = 24, 20, 26, 200
PAPER, INK, FAINT, EDGE = (250, 250, 250), (20, 20, 20), (95, 95, 95), (255, 190, 0)
DROPPED_LIGHT, DROPPED_COLOR = 0.28, 0.35  # of the original's


@dataclass(frozen=True)
class Shot:
    """Holds a screenshot, its column's title, and its grid of visual tokens (rows, columns)."""

    image: Image.Image
    title: str
    grid: Cell


@dataclass(frozen=True)
class Geometry:
    """Holds positions in pixels. cell: side of a visual token. left: left edge of each column."""

    cell: int
    left: tuple[int, ...]
    top: int
    row_height: int
    size: tuple[int, int]


def geometry(shots: Sequence[Shot], layers: int) -> Geometry:
    """Places everything. Cells have their screen size, or less to stay within MAX_WIDTH."""
    frame = 2 * MARGIN + ROW_TITLE + GAP * (len(shots) - 1)
    room = max(1, (MAX_WIDTH - frame) // len(shots))
    widest = max(columns for _, columns in (shot.grid for shot in shots))
    cell = max(1, min(CELL, room // widest))
    left, x = [], MARGIN + ROW_TITLE
    for shot in shots:
        left.append(x)
        x += max(min(MIN_COLUMN, room), shot.grid[1] * cell) + GAP
    row_height = max(shot.grid[0] for shot in shots) * cell + TITLE + GAP
    top = MARGIN + 3 * TITLE
    height = top + TITLE + (layers + 1) * row_height + MARGIN
    # The lines on top need some width even over a single narrow screenshot.
    return Geometry(cell, tuple(left), top, row_height, (max(x - GAP + MARGIN, 1000), height))


def draw_kept(title: str, shots: Sequence[Shot], layers: Sequence[LayerKept]) -> Image.Image:
    """Draws the screenshots, then a row for each layer: kept cells bright, dropped cells dark."""
    place = geometry(shots, len(layers))
    picture = Image.new("RGB", place.size, PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN - 6), title, INK, _font(24))
    _draw_legend(draw, MARGIN + TITLE + 8)
    y = place.top + TITLE
    _write(draw, MARGIN, y + TITLE, ["screenshots", "as the agent saw them"])
    for shot, x in zip(shots, place.left, strict=True):
        rows, columns = shot.grid
        draw.text((x, y - TITLE - 2), shot.title, INK, _font(20))
        draw.text((x, y), f"{rows} x {columns} = {rows * columns} tokens", FAINT, _font(16))
        picture.paste(_scaled(shot, place.cell), (x, y + TITLE))
    for number, layer in enumerate(layers):
        y += place.row_height
        visual = sum(map(len, layer.frames))
        share = f"{layer.tokens / layer.seen:.0%} of {layer.seen} seen"
        kept = [f"{layer.tokens} tokens kept", share, f"{visual} of screens"]
        _write(draw, MARGIN, y + TITLE, [f"layer {number}", *kept, f"{layer.text} of text"])
        for shot, x, cells in zip(shots, place.left, layer.frames, strict=True):
            total = shot.grid[0] * shot.grid[1]
            draw.text((x, y), f"{len(cells)} of {total} kept", INK, _font(16))
            picture.paste(_dimmed(shot, place.cell, cells), (x, y + TITLE))
    return picture


def _draw_legend(draw: ImageDraw.ImageDraw, y: int) -> None:
    draw.rectangle((MARGIN, y, MARGIN + 19, y + 19), fill=(235, 235, 235), outline=EDGE, width=2)
    draw.text((MARGIN + 28, y), "kept in this layer's cache", INK, _font(16))
    draw.rectangle((MARGIN + 260, y, MARGIN + 279, y + 19), fill=(60, 60, 60))
    draw.text((MARGIN + 288, y), "dropped", INK, _font(16))
    note = "one square = one visual token; state at the end of the session, oldest frame left"
    draw.text((MARGIN + 385, y), note, FAINT, _font(16))


def _write(draw: ImageDraw.ImageDraw, x: int, y: int, lines: Sequence[str]) -> None:
    """The first line large, the others smaller below it."""
    draw.text((x, y), lines[0], INK, _font(20))
    for i, line in enumerate(lines[1:], start=1):
        draw.text((x, y + 6 + 22 * i), line, FAINT, _font(16))


def _scaled(shot: Shot, cell: int) -> Image.Image:
    rows, columns = shot.grid
    return shot.image.resize((columns * cell, rows * cell), Image.Resampling.LANCZOS)


def _dimmed(shot: Shot, cell: int, kept: frozenset[Cell]) -> Image.Image:
    bright = _scaled(shot, cell)
    image = ImageEnhance.Color(bright).enhance(DROPPED_COLOR)
    image = ImageEnhance.Brightness(image).enhance(DROPPED_LIGHT)
    draw = ImageDraw.Draw(image)
    for row, column in kept:
        box = (column * cell, row * cell, (column + 1) * cell, (row + 1) * cell)
        image.paste(bright.crop(box), box[:2])
        edge = (box[0], box[1], box[2] - 1, box[3] - 1)
        draw.rectangle(edge, outline=EDGE, width=max(1, cell // 16))
    return image


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
