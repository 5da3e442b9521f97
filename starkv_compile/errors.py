"""The errors of this package, one class for each kind of mistake. All are `StarKVError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StarKVError(Exception):
    """Base class of every error that this package raises on purpose."""


def root_cause(error: BaseException) -> str:
    """Returns class and first line of the error that started a chain of causes, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said.strip()}"


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """Returns a question with the nearest name of `known` and a space, or "" if no name is near."""
    near = difflib.get_close_matches(str(given), list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


class OptionError(StarKVError, ValueError):
    """A configuration value is unknown or impossible."""


class UnsupportedModel(StarKVError):
    """The model, or this use of it, cannot be compressed without wrong results."""


class CacheError(StarKVError, RuntimeError):
    """A compressed cache cannot do this operation without wrong results."""


class SessionFileError(StarKVError, ValueError):
    """A file is no saved session, is damaged, or belongs to another model or processor."""


class NonFiniteScores(StarKVError, ArithmeticError):
    """With `debug=True`, a query or key was NaN or infinite. The message names the layer."""


class PolicyError(StarKVError, RuntimeError):
    """A user's policy failed while it scored a layer. The message names policy and layer."""


class MissingPackage(StarKVError, ImportError):
    """A package that this feature needs is not installed. The message says how to install it."""


__all__ = [
    "CacheError",
    "MissingPackage",
    "NonFiniteScores",
    "OptionError",
    "PolicyError",
    "SessionFileError",
    "StarKVError",
    "UnsupportedModel",
    "did_you_mean",
    "root_cause",
]
