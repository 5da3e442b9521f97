"""Says in sentences what the probe found out about one family."""

from __future__ import annotations

from .markdown import reasons_of
from .probe import BUDGET, Row

IMAGES = {
    "two": "The prompt has two images.",
    "separate": "The images are not tokens of the prompt, so only text is compressed.",
    "none": "The prompt has text only.",
}
LAYOUTS = {
    "grid": "starkv finds their tokens, and knows their rows and columns.",
    "positions": "starkv finds their tokens, and reads rows and columns from their positions.",
    "square": "starkv finds their tokens, and takes each image for a square.",
}


def in_words(row: Row) -> str:
    """Several lines: the verdict, then what it rests on."""
    return "\n  ".join([f"{row.family}: {row.verdict}", *_sentences(row)])


def _sentences(row: Row) -> list[str]:
    if row.verdict == "not tried":
        return [f"A tiny model of this family could not be run here: {row.failure}"]
    said = [f"Graph breaks in the prompt: {row.breaks}."]
    why = reasons_of(row)
    if row.verdict == "WRONG":
        return ["The results are wrong. Please report this.", *why, *said]
    if row.verdict == "uncompressed":
        return ["The output is the same as without starkv. The reasons:", *why, *said]
    layers = f"{row.rewritten} of {row.found} attention layers"
    return [
        f"{layers} are compressed. Each stores {row.kept} of {row.seen} tokens (budget "
        f"{BUDGET:.0%}), which are the tokens that it should store.",
        *([f"The others are not, because {why[0]}"] if len(why) == 1 else why),
        " ".join(filter(None, (IMAGES[row.images], LAYOUTS.get(row.layout, "")))),
        "With a budget of 100% the output is bit-identical to that without starkv.",
        *said,
    ]
