"""Lists the words of the demo agent: element names, coordinates, question forms.

Coordinates go from 0 to 1000, as Qwen3-VL writes them, in 25 bins of 40. So one token says
`x=420`. Every screen cell is wider than a bin. Hence the centre of the right bin is always inside
the cell, and an answer is either right or wrong.
"""

from __future__ import annotations

ICON_COLORS = ("red", "orange", "green", "blue", "purple", "black")
ICON_SHAPES = ("star", "disc", "square", "triangle", "diamond", "cross", "ring", "arrow")
WIDGET_KINDS = ("button", "link", "field", "tab")
WIDGET_WORDS = (
    "save",
    "open",
    "edit",
    "view",
    "copy",
    "help",
    "home",
    "mail",
    "next",
    "back",
    "find",
    "undo",
    "sort",
    "send",
    "lock",
    "play",
)

ATTRIBUTES = ICON_COLORS + WIDGET_KINDS
NOUNS = ICON_SHAPES + WIDGET_WORDS
NAMES = tuple((c, s) for c in ICON_COLORS for s in ICON_SHAPES) + tuple(
    (k, w) for k in WIDGET_KINDS for w in WIDGET_WORDS
)

COORDINATE_RANGE = 1000
BIN_WIDTH = 40
BIN_CENTERS = tuple(range(BIN_WIDTH // 2, COORDINATE_RANGE, BIN_WIDTH))
MAX_STEP = 40

PAD, USER, AGENT, END = "<|pad|>", "<|user|>", "<|agent|>", "<|end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (PAD, USER, AGENT, END, VISION_START, VISION_END, IMAGE, VIDEO)
UNKNOWN = "<|unknown|>"

VERBS = ("click", "where", "what", "return")
FILLERS = ("step", "at", "it", "is", "(", ")", ".")

TOKENS = (
    *SPECIAL_TOKENS,
    UNKNOWN,
    *VERBS,
    *FILLERS,
    *ATTRIBUTES,
    *NOUNS,
    *(f"x={c}" for c in BIN_CENTERS),
    *(f"y={c}" for c in BIN_CENTERS),
    *(str(i) for i in range(1, MAX_STEP + 1)),
)
TOKEN_ID = {token: i for i, token in enumerate(TOKENS)}


def coordinate_bin(index: int, cells: int) -> int:
    """Returns the bin of the centre of cell `index`, on an axis of `cells` cells."""
    return int((index + 0.5) / cells * COORDINATE_RANGE) // BIN_WIDTH
