"""One class per mistake a caller can make. All of them are `StarKVError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StarKVError(Exception):
    """Base of every error this package raises on purpose."""


def root_cause(error: BaseException) -> str:
    """The kind and first line of what an error was first raised from, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said.strip()}"


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """A question with the nearest of `known` and a space, or nothing where none is near."""
    near = difflib.get_close_matches(str(given), list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


class OptionError(StarKVError, ValueError):
    """A configuration value is unknown or impossible."""


class UnsupportedModel(StarKVError):
    """Nothing of the model, or of this use of it, can be compressed rightly."""


class CacheError(StarKVError, RuntimeError):
    """An operation that a compressed cache cannot do without giving wrong results."""


class NonFiniteScores(StarKVError, ArithmeticError):
    """Debug mode met queries or keys that are not finite; the message names the layer."""


class MissingPackage(StarKVError, ImportError):
    """A package that this part needs is not installed."""


__all__ = [
    "CacheError",
    "MissingPackage",
    "NonFiniteScores",
    "OptionError",
    "StarKVError",
    "UnsupportedModel",
    "did_you_mean",
    "root_cause",
]
