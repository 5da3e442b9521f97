"""The names of policies: those of this package, and those that other packages register."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import OptionError, did_you_mean
from ..validation import is_number
from .age_decay import AgeDecay
from .base import Policy
from .current_frame import CurrentFrame
from .expected_attention import ExpectedAttention
from .gui_kv import GuiKV
from .key_novelty import KeyNovelty
from .mixkv import MixKV
from .pyramidkv import PyramidKV
from .random import Random
from .screen_novelty import ScreenNovelty
from .snapkv import SnapKV
from .snapkv_boost import SnapKVBoost
from .snapkv_mean import SnapKVMean
from .st_lite import STLite
from .starkv import StarKV
from .streaming_llm import StreamingLLM
from .tova import Tova
from .vl_cache import VLCache

GROUP = "starkv.policies"
"""An entry point of this group names a policy class. Options use the name of the entry point."""

POLICIES: Mapping[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        ScreenNovelty,
        StarKV,
        SnapKV,
        SnapKVMean,
        SnapKVBoost,
        PyramidKV,
        MixKV,
        VLCache,
        GuiKV,
        STLite,
        KeyNovelty,
        AgeDecay,
        CurrentFrame,
        ExpectedAttention,
        Tova,
        StreamingLLM,
        Random,
    )
}
"""The policies of this package."""


ELSEWHERE: dict[str, tuple[str, Callable[[float], float]]] = {
    "compression_ratio": ("budget", lambda ratio: 1 - ratio),  # kvpress: what leaves
    "keep_ratio": ("budget", lambda ratio: ratio),
    "retention_ratio": ("budget", lambda ratio: ratio),
    "max_capacity_prompt": ("budget_tokens", lambda tokens: tokens),
    "max_capacity_prompts": ("budget_tokens", lambda tokens: tokens),
    "window_size": ("window", lambda tokens: tokens),
    "kernel_size": ("pool", lambda tokens: tokens),
}
"""Options of other libraries: their names here, and how values become ours."""


def policy_names() -> tuple[str, ...]:
    """Returns every name that the option `policy` accepts: this package's, then registered ones."""
    return (*POLICIES, *(name for name in _registered() if name not in POLICIES))


def find_policy(name: str) -> type[Policy]:
    """Returns the policy class called `name`.

    Raises:
        OptionError: no policy has this name, or the package that registered it cannot be loaded.
    """
    if isinstance(name, str) and name in POLICIES:
        return POLICIES[name]
    if isinstance(name, str) and name in _registered():
        return _load(_registered()[name])
    names = policy_names()
    raise OptionError(
        f"policy={name!r}: {did_you_mean(name, names)}expected an instance of "
        f"starkv_compile.policies.Policy, or one of {', '.join(map(repr, names))}"
    )


def policy_of(
    policy: Policy | str, options: Mapping[str, Any] | None = None, others: Sequence[str] = ()
) -> Policy:
    """Returns the policy for a name or an instance, and flat options.

    Args:
        policy: a name or an instance.
        options: values of the policy's fields. An instance takes none.
        others: names of other options, which errors list as known.

    Raises:
        OptionError: the name is unknown, an option is impossible, or the policy does not read it.
    """
    options = dict(options or {})
    if not isinstance(policy, Policy):
        chosen = find_policy(policy)
        _check_options_are_read(chosen, options, others)
        _check_nothing_is_missing(policy, chosen, options)
        return chosen(**{name: v for name, v in options.items() if name in chosen.options()})
    for name, value in options.items():
        if name in policy.options() and value == getattr(policy, name):
            continue
        raise OptionError(
            f"{name}={value!r} with policy={policy!r}: give the option to the policy itself, as in "
            f"policy={type(policy).__name__}({name}={value!r})"
        )
    return policy


def name_of(policy: Policy) -> str | None:
    """Returns the name under which options find the policy's class; None: it has none."""
    for name, cls in POLICIES.items():
        if type(policy) is cls:
            return name
    for name, point in _registered().items():
        if name not in POLICIES and _names(point, type(policy)):
            return name
    return None


def address_of(policy: Policy) -> str:
    """Returns the name under which options find the policy's class, else where the class is."""
    return name_of(policy) or f"{type(policy).__module__}:{type(policy).__qualname__}"


def _check_options_are_read(
    policy: type[Policy], options: Mapping[str, Any], others: Sequence[str]
) -> None:
    for name, value in options.items():
        if name in policy.options():
            continue
        readers = [other for other, cls in POLICIES.items() if name in cls.options()]
        if any(value == getattr(POLICIES[reader], name) for reader in readers):
            continue  # a default changes nothing, so callers may give every option
        reads = ", ".join(policy.options()) or "none"
        if readers:
            raise OptionError(
                f"{name}={value!r} does nothing with policy={policy.name!r}, whose options are "
                f"{reads}; leave it out, or choose a policy that reads it: "
                f"{', '.join(map(repr, readers))}"
            )
        if name in ELSEWHERE and is_number(value):
            ours, convert = ELSEWHERE[name]
            raise OptionError(
                f"{name}={value!r} is no option of backend 'starkv'. Here it is "
                f"{ours}={round(convert(value), 6):g}"
            )
        known = (*others, *policy.options())
        everywhere = (*known, *(option for cls in POLICIES.values() for option in cls.options()))
        raise OptionError(
            f"{name!r} is no option of backend 'starkv' or of its policy {policy.name!r}; "
            f"{did_you_mean(name, everywhere)}known: {', '.join(known)}"
        )


def _check_nothing_is_missing(name: str, policy: type[Policy], options: Mapping[str, Any]) -> None:
    needed = [
        field.name
        for field in fields(policy)
        if field.default is MISSING and field.default_factory is MISSING
    ]
    missing = [option for option in needed if option not in options]
    if missing:
        raise OptionError(
            f"policy={name!r} needs a value for {', '.join(missing)}: give it as an option, or "
            f"give an instance, policy={policy.__name__}({missing[0]}=...)"
        )


@cache
def _registered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _load(point: EntryPoint) -> type[Policy]:
    package = point.dist.name if point.dist else point.value
    try:
        policy = point.load()
    except Exception as error:
        raise OptionError(
            f"policy={point.name!r} of {package} cannot be loaded ({error}); update {package}, or "
            "choose another policy"
        ) from error
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise OptionError(
            f"policy={point.name!r} of {package} is {policy!r}; the entry point must name a "
            "subclass of starkv_compile.policies.Policy"
        )
    return policy


def _names(point: EntryPoint, policy: type[Policy]) -> bool:
    """Whether an entry point names this very class. Imports no package that nobody uses."""
    package = point.value.partition(":")[0].partition(".")[0]
    try:
        return package in sys.modules and _load(point) is policy
    except OptionError:
        return False
