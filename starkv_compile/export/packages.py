"""Packages that only export needs, imported when it does."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import StarKVError


class MissingPackage(StarKVError, ImportError):
    """A package that this part needs is not installed."""


def needs(name: str) -> Any:
    """The module `name`, or one sentence on how to get it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackage(
            f"{name} is not installed: pip install 'starkv-compile[export]' ({error})"
        ) from error
