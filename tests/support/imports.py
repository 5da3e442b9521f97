"""Which package of the compiler imports which, read off the source; nothing is imported for it."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CORE, LAB, DOOR = "starkv_compile", "starkv_lab", "package"
"""The two distributions; and the core's own `__init__` and `__main__`, on top of all packages."""


@dataclass(frozen=True)
class Import:
    """One import of a file. source, target: packages. where: file and line."""

    source: str
    target: str
    where: str


def imports(root: Path) -> list[Import]:
    """From one package of `root`/starkv_compile to another or to the laboratory, even if lazy."""
    found = []
    for file in sorted((root / CORE).rglob("*.py")):
        module = file.relative_to(root).with_suffix("").parts
        source = _package_of(module)
        for line, target in _imported(ast.parse(file.read_text()), module[:-1]):
            package = LAB if target[0] == LAB else _package_of(target)
            if target[0] in (CORE, LAB) and package != source:
                found.append(Import(source, package, f"{file.relative_to(root)}:{line}"))
    return found


def imports_inside(root: Path, package: str) -> list[Import]:
    """From one folder of `root`/starkv_compile/`package` to another, lazy ones as well."""
    found = []
    for file in sorted((root / CORE / package).rglob("*.py")):
        module = file.relative_to(root).with_suffix("").parts
        for line, target in _imported(ast.parse(file.read_text()), module[:-1]):
            inside = target[:2] == (CORE, package) and len(target) > 2
            if inside and len(module) > 3 and target[2] != module[2]:
                found.append(Import(module[2], target[2], f"{file.relative_to(root)}:{line}"))
    return found


def packages(root: Path) -> set[str]:
    """The packages of `root`/starkv_compile: folders, and single files at the top."""
    return {
        _package_of((CORE, path.stem))
        for path in (root / CORE).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }


def _package_of(module: tuple[str, ...]) -> str:
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
            if base == (CORE,):  # `from .. import config`: what is imported may be a package
                yield from ((node.lineno, (*base, alias.name)) for alias in node.names)
            else:
                yield node.lineno, base
