"""Names of a package that are imported at their first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns the function `__getattr__` of `package`.

    Args:
        package: full name of the package.
        homes: for each name, the module that has it, relative to the package. "" if the name is
            itself a module.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        module = import_module(f".{home or name}", package)
        return getattr(module, name) if home else module

    return find
