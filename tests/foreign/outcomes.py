"""What becomes of each style, compiled in each way: the table of docs/guides/own-models.md."""

from tests.foreign.styles import STYLES
from tests.foreign.ways import WAYS

COMPRESSED = "compressed"
UNCOMPRESSED = "uncompressed"
REFUSED = "`UnsupportedModel`"

_WITH_A_CACHE = {
    "Cache of transformers",
    "mask of the cache's size",
    "mask put in in place",
    "own generate, Cache of transformers",
    "nested model of transformers",
    "module around a model",
    "PEFT",
}
_WITH_A_DECODER = {"tuple cache of remote code", "mask of all tokens seen"}


def _outcome(style: str, way: str) -> str:
    if style in _WITH_A_CACHE:
        return UNCOMPRESSED if way == "torch.compile(function)" else COMPRESSED
    if way == "starkv_compile.compile(model)" and style not in _WITH_A_DECODER:
        return REFUSED
    return UNCOMPRESSED


OUTCOMES = {
    name: {
        way: _outcome(name, way) for way in WAYS if style.blocks or way != "each block.compile()"
    }
    for name, style in STYLES.items()
}


def table() -> str:
    """The table of docs/guides/own-models.md."""
    ways = [way for way in WAYS if way != "each block.compile()"]
    lines = [
        "| style | as in | " + " | ".join(f"`{way}`" for way in ways) + " |",
        "| --- " * (2 + len(ways)) + "|",
    ]
    for name, style in STYLES.items():
        cells = [OUTCOMES[name][way] for way in ways]
        lines.append(f"| {name} | {style.words} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
