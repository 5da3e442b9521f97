"""Which model family of transformers a published checkpoint belongs to."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import transformers

from starkv_compile import OptionError
from starkv_compile.errors import did_you_mean


class Checkpoint(NamedTuple):
    """Holds checkpoints of one family.

    names: beginnings of their names on the hub, without the organisation. family: the model type in
    their config.json. note: what else a user should know.
    """

    names: tuple[str, ...]
    family: str
    note: str = ""


OWN_CODE = (
    "These checkpoints bring code of their own (trust_remote_code), so the family tells little. "
    "Load the model and call starkv_compile.compile(model): the report says what was compressed."
)

CHECKPOINTS = (
    Checkpoint(("UI-TARS-1.5",), "qwen2_5_vl"),
    Checkpoint(("UI-TARS-2B", "UI-TARS-7B", "UI-TARS-72B"), "qwen2_vl"),
    Checkpoint(("OpenCUA",), "qwen2_5_vl", OWN_CODE),
    Checkpoint(("GUI-Owl-1.5",), "qwen3_vl"),
    Checkpoint(("GUI-Owl-7B", "GUI-Owl-32B"), "qwen2_5_vl"),
    Checkpoint(("EvoCUA",), "qwen3_vl"),
    Checkpoint(("UI-Venus-1.5",), "qwen3_vl"),
    Checkpoint(("UI-Venus-1.5-30B-A3B", "Holo2-30B-A3B", "Holo2-235B-A22B"), "qwen3_vl_moe"),
    Checkpoint(("UI-Venus-Ground", "UI-Venus-Navi"), "qwen2_5_vl"),
    Checkpoint(("Holo1", "Holo1.5"), "qwen2_5_vl"),
    Checkpoint(("Holo2",), "qwen3_vl"),
    Checkpoint(("Fara-7B", "GTA1", "Jedi", "GUI-Libra-3B"), "qwen2_5_vl"),
    Checkpoint(("ShowUI-2B", "OS-Atlas-Base-7B", "UGround-V1", "Aguvis"), "qwen2_vl"),
    Checkpoint(("Qwen3-VL-30B-A3B", "Qwen3-VL-235B-A22B"), "qwen3_vl_moe"),
    Checkpoint(("Qwen3-VL",), "qwen3_vl"),
    Checkpoint(("Qwen2.5-VL",), "qwen2_5_vl"),
    Checkpoint(("Qwen2-VL",), "qwen2_vl"),
    Checkpoint(("SmolVLM2",), "smolvlm"),
    Checkpoint(("SmolVLM", "SmolVLM-256M", "SmolVLM-500M"), "idefics3"),
    Checkpoint(("gemma-3",), "gemma3"),
    Checkpoint(("gemma-3n",), "gemma3n"),
    Checkpoint(("llava-1.5",), "llava"),
)
"""From the checkpoints' model cards and papers. A file config.json is asked before this table."""


def checkpoint_table() -> str:
    """The table as Markdown, with a row for each family."""
    rows: dict[str, list[str]] = {}
    for each in CHECKPOINTS:
        mark = " (code of their own)" if each.note else ""
        rows.setdefault(each.family, []).extend(f"{name}{mark}" for name in each.names)
    lines = [f"| {family} | {', '.join(names)} |" for family, names in sorted(rows.items())]
    return "\n".join(
        ["| family | checkpoints, by the beginning of their names |", "| --- | --- |", *lines]
    )


def asked_families(names: Sequence[str], known: Collection[str]) -> dict[str, list[str]]:
    """Returns the families to try, each with what to say about the names that led to it.

    Args:
        names: families, folders with a config.json, or names of checkpoints.
        known: the families of the installed transformers.

    Raises:
        OptionError: a name is none of these.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        if name in known:
            found.setdefault(name, [])
            continue
        for family, said in _of_folder(name) or _of_table(name, known):
            if family not in known:
                raise OptionError(
                    f"{said} transformers {transformers.__version__} has no such family to try"
                )
            found.setdefault(family, []).append(said)
    return found


def _of_folder(name: str) -> list[tuple[str, str]]:
    file = Path(name) / "config.json"
    if not file.is_file():
        return []
    try:
        family = json.loads(file.read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise OptionError(f"{file}: it names no model_type") from None
    return [(family, f"{name} has model_type {family!r}.")]


def _of_table(name: str, known: Collection[str]) -> list[tuple[str, str]]:
    wanted = _plain(name.rpartition("/")[2])
    listed = [(one, each) for each in CHECKPOINTS for one in each.names]
    inside = [(one, each) for one, each in listed if _plain(one) in wanted]
    if inside:
        inside = [max(inside, key=lambda pair: len(pair[0]))]
    elif wanted:
        inside = [(one, each) for one, each in listed if wanted in _plain(one)]
    if not inside:
        near = did_you_mean(name, [*known, *(one for one, _ in listed)])
        raise OptionError(
            f"{name!r} is no family of transformers {transformers.__version__}, no folder with a "
            f"config.json, and no checkpoint that starkv knows: {near}give "
            "the model_type of its config.json, such as qwen2_5_vl, or download the checkpoint "
            "and give its folder"
        )
    return [
        (each.family, f"{one} has model_type {each.family!r}.{each.note and ' ' + each.note}")
        for one, each in inside
    ]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
