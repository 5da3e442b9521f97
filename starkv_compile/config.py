"""What to keep and how to score: one frozen object, validated when it is made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from .errors import OptionError, did_you_mean

if TYPE_CHECKING:
    from .policies import Policy

INNER_BACKENDS = ("inductor", "aot_eager", "eager", "tensorrt")
GRIDS = ("true", "square")
ENTROPIES = ("subspace", "global", "off")


@dataclass(frozen=True, kw_only=True)
class StarKVConfig:
    """Options of the `starkv` backend. Unknown keys and impossible values raise `OptionError`.

    The defaults are ours; `StarKVConfig.paper()` is the published method as released
    (arXiv 2606.01790), which is another policy. Symbols in brackets are the paper's.
    """

    budget: float = 0.2
    """Share of all tokens seen that stays in the cache, window included: 0 < budget <= 1."""

    budget_tokens: int | None = None
    """Keep at most this many tokens a layer, whatever the length. In place of `budget`."""

    budget_bytes: int | None = None
    """After a prompt the keys and values of all compressed layers and batch rows together hold at
    most this many bytes, those that `decode_tokens` adds included. In place of `budget` and
    `budget_tokens`. Layers left whole (sliding windows) do not count; nor does what is decoded
    without `decode_tokens`, until the next prompt."""

    layer_budgets: tuple[float, ...] | None = None
    """How much each compressed layer keeps in proportion to the others, first to last, beyond its
    window; the total is that of the budget. None: as much each, unless the policy has a rule. One
    prompt a cache, without padding."""

    decode_tokens: int | None = None
    """Decode in buffers with room for this many tokens, at fixed addresses, whose shape does not
    change from token to token; a full one is replaced by one with as much room again. None: the
    cache grows by one token at a time."""

    window: int = 8
    """Last tokens, always kept, whose queries do the scoring [W]. 1 to 64."""

    pool: int = 5
    """Width of the moving average over attention scores. Odd; 1 = none."""

    boost: float = 2.0
    """Score mass added to the current frame, shared out by hidden norm [alpha]. 0 = none."""

    boost_temperature: float = 3.5
    """Temperature of that sharing out."""

    mi_weight: float = 0.5
    """Weight of the mutual-information prior once ramped up [lambda]. 0 = none, 1 = all."""

    mi_warm_steps: int = 5
    """Agent steps before the prior begins."""

    mi_ramp_steps: int = 10
    """Agent steps over which the prior grows to `mi_weight`."""

    mi_decay: float = 0.9
    """Weight of the past in the average of mutual information over agent steps."""

    mi_temperature: float = 1.0
    """Temperature of the softmax over subspaces [tau]."""

    frame_decay: float = 0.1
    """Discount rate per frame of age [delta]. 0 = none."""

    frame_floor: float = 0.0
    """Smallest factor the discount can reach [D_min]."""

    pattern_decay: float = 0.9
    """Weight of the past in the average attention pattern [rho]."""

    stability_floor: float = 0.0
    """Smallest stability that enters the discount [epsilon]."""

    entropy: str = "subspace"
    """Where entropy acts. "subspace": each KV head's scores are sharpened or flattened by their
    own entropy before heads are fused. "global": one power on the fused scores, as in the paper;
    it is monotone, so it cannot change what is kept. "off"."""

    entropy_low: float = 0.75
    """Temperature at zero entropy [T_min]."""

    entropy_high: float = 1.25
    """Temperature at full entropy [T_max]."""

    grid: str = "true"
    """Screen grid for mutual information. "true": the frame's rows and columns. "square": a
    square guessed from the number of tokens, as in the paper's release."""

    novelty_weight: float = 1.0
    """Weight of key novelty beside attention, in the policies "key_novelty" and, for text,
    "screen_novelty" [nu]."""

    attention_weight: float = 0.5
    """Weight of attention beside novelty, in the policy "screen_novelty" [nu]. 0 = none."""

    text_weight: float = 2.0
    """How many times as large a share of the text as of the screens is kept, in that policy: of
    what the session has seen, not of what is stored."""

    policy: str = "screen_novelty"
    """How tokens are scored: a name in `starkv_compile.policies.POLICIES`; docs/policies.md. Each
    reads some of the options of scoring; one that it does not read must have its default."""

    inner: str = "inductor"
    """Backend that compiles the rewritten graph: "inductor", "aot_eager", "eager", or "tensorrt",
    which is torch-tensorrt's."""

    debug: bool = False
    """Raise `NonFiniteScores`, naming the layer, when a query or key is NaN or infinite. Costs
    host synchronisations; works with inner="eager"."""

    def __post_init__(self) -> None:
        _check_number(self, "budget", above=0, most=1)
        if self.budget_tokens is not None:
            _check_integer(self, "budget_tokens", least=2)
        if self.budget_bytes is not None:
            _check_integer(self, "budget_bytes", least=1)
        self._check_one_budget()
        if self.decode_tokens is not None:
            _check_integer(self, "decode_tokens", least=1)
        _check_integer(self, "window", least=1, most=64)
        _check_integer(self, "pool", least=1, most=63)
        if self.pool % 2 == 0:
            raise OptionError(f"pool={self.pool}: an odd number is needed; try {self.pool + 1}")
        for name in ("boost", "frame_decay", "novelty_weight", "attention_weight"):
            _check_number(self, name, least=0)
        for name in (
            "boost_temperature",
            "mi_temperature",
            "entropy_low",
            "entropy_high",
            "text_weight",
        ):
            _check_number(self, name, above=0)
        self._check_layer_budgets()
        for name in ("mi_weight", "mi_decay", "frame_floor", "pattern_decay", "stability_floor"):
            _check_number(self, name, least=0, most=1)
        _check_integer(self, "mi_warm_steps", least=0)
        _check_integer(self, "mi_ramp_steps", least=1)
        _check_choice(self, "policy", tuple(_policies()))
        self._check_options_are_read()
        if self.decode_tokens is not None and _policies()[self.policy](self).is_uneven():
            why = "layer_budgets" if self.layer_budgets else f"policy={self.policy!r}"
            raise OptionError(
                f"decode_tokens={self.decode_tokens} with {why}: layers hold different numbers of "
                "tokens, and one slot is not the next one's in all of them; leave out decode_tokens"
            )
        _check_choice(self, "entropy", ENTROPIES)
        _check_choice(self, "grid", GRIDS)
        _check_choice(self, "inner", INNER_BACKENDS)
        if not isinstance(self.debug, bool):
            raise OptionError(f"debug={self.debug!r}: expected True or False")
        if self.debug and self.inner != "eager":
            raise OptionError(
                f"debug=True with inner={self.inner!r}: the check reads values on the host; use "
                'inner="eager" with it'
            )

    def _check_layer_budgets(self) -> None:
        given = self.layer_budgets
        if given is None:
            return
        numbers = isinstance(given, (tuple, list)) and all(map(_is_number, given))
        if not numbers or not given or min(given) <= 0:
            raise OptionError(
                f"layer_budgets={given!r}: expected a number above 0 for each compressed layer, "
                "such as (3, 2, 1)"
            )
        object.__setattr__(self, "layer_budgets", tuple(map(float, given)))

    def _check_options_are_read(self) -> None:
        policies = _policies()
        read = policies[self.policy].reads
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            readers = [name for name, policy in policies.items() if field.name in policy.reads]
            if readers and field.name not in read and value != field.default:
                reads = ", ".join(sorted(read)) or "none of them"
                raise OptionError(
                    f"{field.name}={value!r} does nothing with policy={self.policy!r}, which reads "
                    f"{reads}; leave it out, or choose a policy that reads it: "
                    f"{', '.join(map(repr, readers))}"
                )

    def _check_one_budget(self) -> None:
        kinds = ("budget_bytes", "budget_tokens", "budget")
        given = [n for n in kinds if getattr(self, n) != getattr(type(self), n)]
        if len(given) > 1:
            first, other = given[:2]
            raise OptionError(
                f"{first}={getattr(self, first)} with {other}={getattr(self, other)}: one budget "
                f"at a time; leave out {other}"
            )

    @classmethod
    def paper(cls, **changes: Any) -> StarKVConfig:
        """The method as its authors released it, with `changes` on top."""
        paper = {"policy": "starkv", "entropy": "global", "grid": "square"}
        return cls.from_options({**paper, **changes})

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> StarKVConfig:
        """From the `options` of `torch.compile`."""
        options = dict(options or {})
        known = [field.name for field in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                raise OptionError(
                    f"{key!r} is no option of backend 'starkv'; {did_you_mean(key, known)}"
                    f"known: {', '.join(known)}"
                )
        return cls(**options)

    def to_options(self) -> dict[str, Any]:
        """The values that differ from the defaults, as `options` for `torch.compile`."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    @property
    def keeps_everything(self) -> bool:
        """Whether this configuration leaves every graph and cache as it is."""
        return self.budget == 1.0 and self.budget_tokens is None and self.budget_bytes is None

    @property
    def leaves_cache(self) -> bool:
        """Whether the cache may stay the library's own."""
        return self.keeps_everything and self.decode_tokens is None

    @property
    def fraction(self) -> Fraction:
        """`budget` as the exact fraction its decimal form means: 0.2 is 1/5."""
        return Fraction(str(self.budget))

    def capacity(self, seen: int, token_bytes: int | None = None) -> int:
        """Tokens to keep of `seen`, window included: floor(seen * budget), or `budget_tokens`.

        Integer arithmetic only: `seen` may be a symbolic length.

        Args:
            token_bytes: bytes of one token in all compressed layers and batch rows, which
                `budget_bytes` is counted in.
        """
        if self.budget_bytes is not None:
            if token_bytes is None:
                raise OptionError(
                    f"budget_bytes={self.budget_bytes}: how many tokens these are depends on the "
                    "model; use budget_tokens where there is none"
                )
            return self.budget_bytes // token_bytes - (self.decode_tokens or 0)
        if self.budget_tokens is not None:
            return self.budget_tokens
        return seen * self.fraction.numerator // self.fraction.denominator

    def fingerprint(self) -> str:
        """Hash of every value, for compile caches."""
        values = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()[:16]


def _policies() -> dict[str, type[Policy]]:
    from .policies import POLICIES  # its modules read this one

    return POLICIES


def _check_number(
    config: StarKVConfig,
    name: str,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> None:
    value = getattr(config, name)
    low = f"more than {above}" if above is not None else f"at least {least}"
    allowed = f"a number, {low}" + (f", at most {most}" if most is not None else "")
    if _is_number(value):
        too_low = (above is not None and value <= above) or (least is not None and value < least)
        if not too_low and not (most is not None and value > most):
            return
    raise OptionError(f"{name}={value!r}: expected {allowed}{_hint(name, value)}")


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _hint(name: str, value: Any) -> str:
    if name != "budget":
        return ""
    if _is_number(value) and value >= 2:
        whole = f"budget={value / 100:g} for {value:g} %, " if value <= 100 else ""
        return f" ({whole}budget_tokens={int(value)} for a number of tokens)"
    if isinstance(value, str):
        return " (pass it without quotes)"
    return " (1.0 keeps everything)"


def _check_integer(config: StarKVConfig, name: str, *, least: int, most: int | None = None) -> None:
    value = getattr(config, name)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and value >= least and (most is None or value <= most):
        return
    allowed = f"a whole number, at least {least}" + (f", at most {most}" if most else "")
    unit = " (of bytes: 2 * 10**9 for 2 GB, 2 << 30 for 2 GiB)" if name == "budget_bytes" else ""
    raise OptionError(f"{name}={value!r}: expected {allowed}{unit}")


def _check_choice(config: StarKVConfig, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise OptionError(
            f"{name}={value!r}: {did_you_mean(value, choices)}expected one of "
            f"{', '.join(map(repr, choices))}"
        )
