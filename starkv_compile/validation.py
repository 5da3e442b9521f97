"""Dataclass fields that check their values. An error says which values are possible.

@dataclass(frozen=True, kw_only=True)
class Options:
    budget: float = number(0.2, above=0, most=1)

    def __post_init__(self) -> None:
        check_fields(self)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from .errors import OptionError, did_you_mean

_NUMBER = re.compile(r"[-+]?[\d./_]{1,40}(e[-+]?\d{1,2})?", re.IGNORECASE)
"""A number whose digits fit on a line. Python would compute 10 ** 999999999 exactly."""

Check = Callable[[str, Any], None]
"""Raises `OptionError` for a field's name and value."""

Hint = Callable[[Any], str]
"""Returns what to write instead of an impossible value: a text that starts with a space, or an
empty text."""


def number(
    default: float,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    hint: Hint = lambda value: "",
) -> Any:
    """A field for a finite number: more than `above` or at least `least`, and at most `most`."""
    low = f"more than {above}" if above is not None else f"at least {least}"
    allowed = f"a number, {low}" + (f", at most {most}" if most is not None else "")

    def check(name: str, value: Any) -> None:
        if is_number(value):
            too_low = (above is not None and value <= above) or (
                least is not None and value < least
            )
            if not too_low and not (most is not None and value > most):
                return
        raise OptionError(f"{name}={value!r}: expected {allowed}{hint(value)}")

    return _checked(default, check)


def integer(
    default: int | None,
    *,
    least: int,
    most: int | None = None,
    odd: bool = False,
    hint: Hint = lambda value: "",
) -> Any:
    """A field for a whole number between `least` and `most`. A default of None may stay None."""
    allowed = f"a whole number, at least {least}" + (f", at most {most}" if most else "")

    def check(name: str, value: Any) -> None:
        if value is None and default is None:
            return
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least or (most is not None and value > most):
            raise OptionError(f"{name}={value!r}: expected {allowed}{hint(value)}")
        if odd and value % 2 == 0:
            raise OptionError(f"{name}={value}: expected an odd number; try {value + 1}")

    return _checked(default, check)


def choice(default: str, choices: tuple[str, ...]) -> Any:
    """A field for one of `choices`."""

    def check(name: str, value: Any) -> None:
        if value not in choices:
            raise OptionError(
                f"{name}={value!r}: {did_you_mean(value, choices)}expected one of "
                f"{', '.join(map(repr, choices))}"
            )

    return _checked(default, check)


def one_of(default: int, choices: tuple[int, ...]) -> Any:
    """A field for one of the numbers `choices`."""

    def check(name: str, value: Any) -> None:
        if type(value) is not int or value not in choices:
            raise OptionError(f"{name}={value!r}: expected one of {', '.join(map(str, choices))}")

    return _checked(default, check)


def flag(default: bool) -> Any:
    """A field for True or False."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, bool):
            raise OptionError(f"{name}={value!r}: expected True or False")

    return _checked(default, check)


def check_fields(instance: Any) -> None:
    """Checks every field that a function of this module made.

    Raises:
        OptionError: a value is impossible.
    """
    for field in dataclasses.fields(instance):
        check = field.metadata.get("check")
        if check is not None:
            check(field.name, getattr(instance, field.name))


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float. True and False do not count."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _checked(default: Any, check: Check) -> Any:
    return dataclasses.field(default=default, metadata={"check": check})


def share(text: str, name: str = "budget") -> Fraction:
    """A share of the tokens, written as 0.2 or 20%.

    Raises:
        OptionError: the text is neither, or a number above 1, which could be meant as a percentage.
    """
    number, per_cent, rest = text.strip().partition("%")
    value = Fraction(-1)
    if _NUMBER.fullmatch(number.strip()):
        with contextlib.suppress(ValueError, ArithmeticError):
            value = Fraction(number) / (100 if per_cent else 1)
    if rest or value < 0:
        raise OptionError(f"{name} {text.strip()!r}: expected a share such as 0.2, or 20%")
    if value > 1:
        meant = f"; for {number} percent write {number}%" if not per_cent and value <= 100 else ""
        raise OptionError(
            f"{name} {text.strip()!r}: expected a share of the tokens, at most 1 or 100%{meant}"
        )
    return value
