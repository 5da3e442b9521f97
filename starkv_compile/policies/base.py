"""The base classes of policies."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ..errors import OptionError
from ..validation import check_fields, integer
from .inputs import Scored, ScoreInputs


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Scores the tokens of one layer. Its options are its fields.

    Subclass it, and decorate a subclass that adds fields with
    `@dataclass(frozen=True, kw_only=True)`. A policy keeps no state: what a layer carries from one
    prompt to the next comes in and goes out through `score`.

    Attributes:
        name: its name in options, reports and errors. The default is the name of its class.
        per_head: whether each KV head keeps a set of tokens of its own.
        fixed_window: how many of the last tokens score the others and always stay. None: the
            configuration's `window`.
        observers: how many of the last queries `score` needs a mask for. 0: those of the window.
        uneven: whether layers keep different numbers of tokens, by `layer_weights`.

    Raises:
        OptionError: the value of a field is impossible.
    """

    name: ClassVar[str] = "Policy"
    per_head: ClassVar[bool] = False
    fixed_window: ClassVar[int | None] = None
    observers: ClassVar[int] = 0
    uneven: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def __post_init__(self) -> None:
        ignored = _ignored_options(type(self))
        if ignored:
            raise OptionError(
                f"{type(self).__name__}: {', '.join(ignored)} cannot be set as an option; "
                "decorate the class with @dataclasses.dataclass(frozen=True, kw_only=True)"
            )
        check_fields(self)
        for name in self.options():
            value = getattr(self, name)
            if value is not None and not isinstance(value, (bool, int, float, str)):
                raise OptionError(
                    f"{type(self).__name__}({name}={value!r}): expected a number, a text, True, "
                    "False or None, as compilers compare options and files hold them"
                )

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Returns the names of the policy's options."""
        return tuple(field.name for field in fields(cls))

    def changed_options(self) -> dict[str, Any]:
        """Returns the options that differ from their defaults."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }

    def layer_weights(self, layers: int) -> tuple[int, ...]:
        """Returns what each of `layers` layers keeps beyond its window, in proportion.

        It is called only if `uneven` is True.

        Args:
            layers: how many layers are compressed.

        Returns:
            A whole number for each layer, first to last.
        """
        raise NotImplementedError

    def score(self, inputs: ScoreInputs) -> Scored:
        """Scores the tokens before the window. Higher scores are kept.

        It runs while a graph is rewritten, and its inputs are proxies of the graph's values. Use
        torch functions, registered ops and tuple indices only. Do not branch on a value or a shape
        in Python.

        Args:
            inputs: the layer's values at a cache write.

        Returns:
            Scores, float32 [B, P], or [B, G, P] with `per_head`, and the layer's new state. Scores
            of all L tokens are allowed as well; those of the window are ignored.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PooledPolicy(Policy):
    """A policy that smooths attention scores over neighbouring tokens."""

    pool: int = integer(5, least=1, most=63, odd=True)
    """Width of the moving average over attention scores, in tokens; odd. 1: no average."""


def _ignored_options(cls: type[Policy]) -> list[str]:
    """What a class without its decorator says about options, which no dataclass has read."""
    if "__dataclass_fields__" in vars(cls):
        return []
    annotated = inspect.get_annotations(cls)
    new = [name for name, kind in annotated.items() if "ClassVar" not in str(kind)]
    changed = [name for name in cls.options() if name in vars(cls)]
    return sorted({*new, *changed})
