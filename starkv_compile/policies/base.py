"""What a policy is."""

from __future__ import annotations

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
        name: what options, reports and errors call it; by default the name of its class.
        per_head: whether each KV head keeps a set of tokens of its own.
        fixed_window: how many of the last tokens score the others, and are kept whatever their
            score. None: as many as the configuration's `window`.
        observers: of how many of the last queries `score` needs a mask. 0: of the window's.
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
        undecorated = set(vars(type(self)).get("__annotations__", {})) - set(type(self).options())
        options = {name for name in undecorated if not _is_class_variable(type(self), name)}
        if options:
            raise OptionError(
                f"{type(self).__name__}: {', '.join(sorted(options))} would be no option; decorate "
                "the class with @dataclasses.dataclass(frozen=True, kw_only=True)"
            )
        check_fields(self)

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """The names of its options."""
        return tuple(field.name for field in fields(cls))

    def changed_options(self) -> dict[str, Any]:
        """Its options that differ from their defaults."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }

    def layer_weights(self, layers: int) -> tuple[int, ...]:
        """What each of `layers` layers keeps beyond its window, in proportion: whole numbers.

        Called where `uneven` is True.
        """
        raise NotImplementedError

    def score(self, inputs: ScoreInputs) -> Scored:
        """Scores float32, higher = more important, and the layer's new state.

        It is called while a graph is rewritten, on proxies of the graph's values: torch functions,
        registered ops and tuple indices only, and no Python control flow on values or shapes.

        Returns:
            Scores [B, P]; with `per_head` [B, G, P]; or of all L tokens, of which the window's are
            not read.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PooledPolicy(Policy):
    """A policy that smooths attention scores over neighbouring tokens."""

    pool: int = integer(5, least=1, most=63, odd=True)
    """Width of the moving average over attention scores, in tokens. 1 = none."""


def _is_class_variable(owner: type, name: str) -> bool:
    return "ClassVar" in str(vars(owner)["__annotations__"][name])
