"""Draws an episode's frames as screenshots (PIL images).

The font comes with Pillow, so the same episode gives the same pixels on every machine.
"""

from __future__ import annotations

import random
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from .vocabulary import ICON_COLORS
from .world import Episode, Frame, Name

CELL = 32  # pixels per side of a cell, which is one visual token of the demo agent
ICON_JITTER, TEXT_JITTER = 2, 1  # most pixels between an element and its cell's centre

_ICON_RGB = {
    "red": (214, 40, 40),
    "orange": (245, 150, 20),
    "green": (40, 160, 60),
    "blue": (40, 90, 220),
    "purple": (150, 60, 190),
    "black": (20, 20, 20),
}
_WALLPAPERS = ((58, 110, 165), (36, 44, 60), (200, 208, 216), (90, 130, 110), (150, 140, 170))
_FILLER = ("lorem", "ipsum", "dolor", "amet", "elit", "sed", "tempor", "magna", "aliqua", "quis")
_MENU = ("File", "Tools", "Window", "About")


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def screenshot(episode: Episode, index: int) -> Image.Image:
    """Draws frame `index` of `episode` as an RGB image, 32 pixels per side of a cell."""
    frame = episode.frames[index]
    image = _decoration(episode.rows, episode.columns, episode.decoration_seed).copy()
    _draw_status(image, frame)
    # The seed does not depend on the step, so an element that stays keeps its pixels.
    for name, (row, column) in frame.elements.items():
        style = random.Random(f"{episode.decoration_seed} {name}")
        sprite = _sprite(name, style.randint(0, 3))
        jitter = ICON_JITTER if name[0] in ICON_COLORS else TEXT_JITTER
        dx, dy = style.randint(-jitter, jitter), style.randint(-jitter, jitter)
        image.paste(sprite, (column * CELL + dx, row * CELL + dy), sprite)
    return image


@lru_cache(maxsize=64)
def _decoration(rows: int, columns: int, seed: int) -> Image.Image:
    """Draws what no question asks about. It stays the same during an episode."""
    rng = random.Random(seed)
    image = Image.new("RGB", (columns * CELL, rows * CELL), rng.choice(_WALLPAPERS))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 2)):
        _draw_window(draw, rng, rows, columns)
    dark = rng.random() < 0.5
    bar, ink = ((45, 45, 48), (230, 230, 230)) if dark else ((238, 238, 238), (40, 40, 40))
    for row in (0, rows - 1):
        draw.rectangle((0, row * CELL, columns * CELL, (row + 1) * CELL - 1), fill=bar)
    for i, word in enumerate(_MENU):
        draw.text((8 + 2 * CELL * i, 9), word, fill=ink, font=_font(11))
    return image


def _draw_window(draw: ImageDraw.ImageDraw, rng: random.Random, rows: int, columns: int) -> None:
    height, width = rng.randint(3, rows - 3), rng.randint(4, columns - 2)
    top, left = rng.randint(1, rows - 1 - height), rng.randint(0, columns - width)
    box = (left * CELL, top * CELL, (left + width) * CELL - 1, (top + height) * CELL - 1)
    draw.rectangle(
        box, fill=rng.choice(((250, 250, 250), (240, 242, 246))), outline=(120, 120, 120)
    )
    title = (box[0], box[1], box[2], box[1] + CELL // 2)
    draw.rectangle(title, fill=rng.choice(((70, 90, 130), (110, 110, 110), (200, 200, 205))))
    for i, color in enumerate(((230, 90, 80), (240, 190, 60), (90, 190, 90))):
        x = box[2] - 12 * (i + 1)
        draw.ellipse((x, box[1] + 4, x + 7, box[1] + 11), fill=color)
    for y in range(box[1] + CELL + 6, box[3] - 12, CELL // 2):
        if rng.random() < 0.5:
            words = " ".join(rng.choices(_FILLER, k=rng.randint(1, 2 + width // 2)))
            draw.text((box[0] + 8, y), words, fill=(205, 205, 210), font=_font(9))


def _draw_status(image: Image.Image, frame: Frame) -> None:
    """Draws a clock, which changes with the step and answers no question."""
    draw = ImageDraw.Draw(image)
    x, y = image.width - 2 * CELL + 12, image.height - CELL + 9
    minutes = 9 * 60 + 7 * frame.step
    draw.text(
        (x, y), f"{minutes // 60:02d}:{minutes % 60:02d}", fill=(128, 128, 128), font=_font(11)
    )


@lru_cache(maxsize=1024)
def _sprite(name: Name, style: int) -> Image.Image:
    """Draws one element on transparent ground. `style`, 0 to 3, varies its size."""
    image = Image.new("RGBA", (CELL, CELL))
    draw = ImageDraw.Draw(image)
    first, second = name
    if first in ICON_COLORS:
        _draw_icon(draw, _ICON_RGB[first], second, radius=8 + style)
    else:
        _draw_widget(draw, first, second, size=(10, 11, 11, 12)[style])
    return image


def _draw_icon(
    draw: ImageDraw.ImageDraw, color: tuple[int, int, int], shape: str, radius: int
) -> None:
    c, r = CELL // 2, radius
    box = (c - r, c - r, c + r, c + r)
    draw.rounded_rectangle((c - 14, c - 14, c + 13, c + 13), 4, fill=(255, 255, 255, 235))
    if shape == "disc":
        draw.ellipse(box, fill=color)
    elif shape == "square":
        draw.rectangle((c - r + 1, c - r + 1, c + r - 1, c + r - 1), fill=color)
    elif shape == "triangle":
        draw.polygon([(c, c - r), (c + r, c + r), (c - r, c + r)], fill=color)
    elif shape == "diamond":
        draw.polygon([(c, c - r), (c + r, c), (c, c + r), (c - r, c)], fill=color)
    elif shape == "cross":
        draw.line((c - r, c - r, c + r, c + r), fill=color, width=4)
        draw.line((c - r, c + r, c + r, c - r), fill=color, width=4)
    elif shape == "ring":
        draw.ellipse(box, outline=color, width=4)
    elif shape == "arrow":
        draw.polygon(
            [
                (c - r, c - 3),
                (c, c - 3),
                (c, c - r),
                (c + r, c),
                (c, c + r),
                (c, c + 3),
                (c - r, c + 3),
            ],
            fill=color,
        )
    elif shape == "star":
        draw.regular_polygon((c, c, r), 3, fill=color)
        draw.regular_polygon((c, c, r), 3, rotation=180, fill=color)
    else:
        raise ValueError(f"shape={shape!r}: expected a shape in ICON_SHAPES")


def _draw_widget(draw: ImageDraw.ImageDraw, kind: str, word: str, size: int) -> None:
    ink: tuple[int, int, int] = (30, 30, 30)
    box = (1, 6, CELL - 2, CELL - 7)
    if kind == "button":
        draw.rounded_rectangle(box, 5, fill=(222, 226, 232), outline=(90, 90, 100))
    elif kind == "field":
        draw.rectangle(box, fill=(255, 255, 255), outline=(40, 90, 200), width=2)
    elif kind == "tab":
        draw.rounded_rectangle((1, 6, CELL - 2, CELL), 6, fill=(60, 64, 72))
        ink = (245, 245, 245)
    elif kind == "link":
        draw.rectangle((1, 8, CELL - 2, CELL - 8), fill=(255, 255, 255, 235))
        ink = (20, 60, 210)
        draw.line((3, CELL - 10, CELL - 4, CELL - 10), fill=ink)
    else:
        raise ValueError(f"kind={kind!r}: expected a kind in WIDGET_KINDS")
    draw.text((CELL // 2, CELL // 2), word, fill=ink, font=_font(size), anchor="mm")
