"""Families of GUI models by name, and which one a checkpoint is of."""

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
SHIPPED = "shipped"  # in a checkpoint's place: the agent that comes with the package

_BY_NAME = {"uitars": UI_TARS, "opencua": OPENCUA, "qwen25vl": QWEN2_5_VL, "qwen3vl": QWEN3_VL}
_BY_TYPE = {"qwen3_vl": QWEN3_VL, "qwen3_vl_moe": QWEN3_VL}


def family_of(checkpoint: str, name: str | None = None) -> Family:
    """The family called `name`; None: the one that the checkpoint's name or model type tells.

    Qwen2.5-VL's model type does not: UI-TARS has it as well, and another prompt.

    Raises:
        OptionError: there is no such family, or nothing tells.
    """
    if name is not None:
        if name not in FAMILIES:
            raise OptionError(f"family {name!r}: known are {', '.join(FAMILIES)}")
        return FAMILIES[name]
    if checkpoint == SHIPPED:
        return SHIPPED_AGENT
    plain = "".join(letter for letter in Path(checkpoint).name.lower() if letter.isalnum())
    for part, family in _BY_NAME.items():
        if part in plain:
            return family
    kind = _model_type(Path(checkpoint))
    if kind in _BY_TYPE:
        return _BY_TYPE[kind]
    raise OptionError(
        f"{checkpoint}: its name does not tell which family of GUI models it is of, so give "
        f"--family, one of {', '.join(FAMILIES)}"
    )


def _model_type(folder: Path) -> str | None:
    try:
        found = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None
