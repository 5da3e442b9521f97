"""Lists the families of GUI models, and finds the family of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from starkv_compile import OptionError

from .base import Family
from .opencua import OPENCUA
from .qwen_vl import QWEN2_5_VL, QWEN3_VL
from .shipped_agent import SHIPPED_AGENT
from .ui_tars import UI_TARS

FAMILIES = {f.name: f for f in (UI_TARS, OPENCUA, QWEN2_5_VL, QWEN3_VL, SHIPPED_AGENT)}
SHIPPED = "shipped"  # in place of a checkpoint: the demo agent

_BY_NAME: dict[str, Family | str] = {
    "uitars15": UI_TARS,
    "uitars": "thousandths of the screenshot",
    "opencuaqwen2": "shares of the screenshot",
    "opencuaa3b": "shares of the screenshot",
    "opencua": OPENCUA,
    "qwen25vl": QWEN2_5_VL,
    "qwen3vl": QWEN3_VL,
}
"""By a part of the name, the first that fits: the family, or coordinates that no parser reads."""
_BY_TYPE = {"qwen3_vl": QWEN3_VL, "qwen3_vl_moe": QWEN3_VL}


def family_of(checkpoint: str, name: str | None = None) -> Family:
    """Returns the family called `name`, or for None that of the checkpoint's name or model type.

    Qwen2.5-VL's model type does not decide, because UI-TARS has the same type and another prompt.

    Raises:
        OptionError: there is no such family, or name and model type do not decide.
    """
    if name is not None:
        if name not in FAMILIES:
            raise OptionError(f"family {name!r}: expected one of {', '.join(FAMILIES)}")
        return FAMILIES[name]
    if checkpoint == SHIPPED:
        return SHIPPED_AGENT
    plain = "".join(letter for letter in Path(checkpoint).name.lower() if letter.isalnum())
    named = next((found for part, found in _BY_NAME.items() if part in plain), None)
    if isinstance(named, str):
        raise OptionError(
            f"{checkpoint}: this checkpoint gives coordinates as {named}, and the parser here "
            "reads pixels of the resized screenshot, so all answers would count as wrong. Give "
            "one of these checkpoints: UI-TARS-1.5, OpenCUA-7B, OpenCUA-32B"
        )
    if named is not None:
        return named
    kind = _model_type(Path(checkpoint))
    if kind in _BY_TYPE:
        return _BY_TYPE[kind]
    raise OptionError(
        f"{checkpoint}: its name does not contain a family of GUI models; give --family, one of "
        f"{', '.join(FAMILIES)}"
    )


def _model_type(folder: Path) -> str | None:
    try:
        found = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None
