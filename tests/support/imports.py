"""Which room of the package imports which, read off the source; nothing is imported for it."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CORE, LAB, DOOR = "starkv_compile", "starkv_lab", "package"
"""The two packages; and the room of the core's `__init__` and `__main__`, on top of all others."""


@dataclass(frozen=True)
class Import:
    """One import of a file. source, target: rooms. where: file and line."""

    source: str
    target: str
    where: str


def imports(root: Path) -> list[Import]:
    """From one room of `root`/starkv_compile to another or to the laboratory, lazy ones as well."""
    found = []
    for file in sorted((root / CORE).rglob("*.py")):
        module = file.relative_to(root).with_suffix("").parts
        source = _room(module)
        for line, target in _imported(ast.parse(file.read_text()), module[:-1]):
            room = LAB if target[0] == LAB else _room(target)
            if target[0] in (CORE, LAB) and room != source:
                found.append(Import(source, room, f"{file.relative_to(root)}:{line}"))
    return found


def imports_inside(root: Path, room: str) -> list[Import]:
    """From one folder of `root`/starkv_compile/`room` to another, lazy ones as well."""
    found = []
    for file in sorted((root / CORE / room).rglob("*.py")):
        module = file.relative_to(root).with_suffix("").parts
        for line, target in _imported(ast.parse(file.read_text()), module[:-1]):
            inside = target[:2] == (CORE, room) and len(target) > 2
            if inside and len(module) > 3 and target[2] != module[2]:
                found.append(Import(module[2], target[2], f"{file.relative_to(root)}:{line}"))
    return found


def rooms(root: Path) -> set[str]:
    """The rooms of `root`/starkv_compile: folders and single files."""
    return {
        _room((CORE, path.stem))
        for path in (root / CORE).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }


def _room(module: tuple[str, ...]) -> str:
    inner = module[1] if len(module) > 1 else "__init__"
    return DOOR if inner in ("__init__", "__main__") else inner


def _imported(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and module of each import, wherever it stands in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            if base == (CORE,):  # `from .. import config`: what is imported may be a room
                yield from ((node.lineno, (*base, alias.name)) for alias in node.names)
            else:
                yield node.lineno, base
