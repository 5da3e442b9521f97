"""The configuration of the backend: one frozen object that checks its values when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, overload

from .errors import OptionError
from .validation import check_fields, choice, flag, integer, is_number, number, one_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .kernels.reference.quantization import TokenBytes
    from .options import Options
    from .policies import Policy

INNER_BACKENDS = ("inductor", "aot_eager", "eager", "tensorrt")

DEFAULT_POLICY = "screen_novelty"

LAYER_STEPS = 1000
"""The whole number that the largest of `layer_budgets` becomes. The others keep their ratio to it,
rounded, so that capacities need whole numbers only."""


class PolicyOrName:
    """The field `policy`. It accepts an instance or a name, and returns the instance."""

    @overload
    def __get__(self, config: None, owner: type[StarKVConfig]) -> str: ...
    @overload
    def __get__(self, config: StarKVConfig, owner: type[StarKVConfig]) -> Policy: ...
    def __get__(self, config: StarKVConfig | None, owner: type[StarKVConfig]) -> Any:
        return DEFAULT_POLICY if config is None else config.__dict__["policy"]

    def __set__(self, config: StarKVConfig, value: Policy | str) -> None:
        from .policies import policy_of  # imports torch, which `starkv --help` should not

        config.__dict__["policy"] = policy_of(value)


def _budget_hint(value: Any) -> str:
    if is_number(value) and value >= 2:
        share = f"budget={value / 100:g} for {value:g} %, " if value <= 100 else ""
        return f" ({share}budget_tokens={int(value)} for a number of tokens)"
    if isinstance(value, str):
        return " (a number without quotes: 0.2 for 20 %)"
    return " (1.0 keeps everything)"


def _bytes_hint(value: Any) -> str:
    return " (of bytes: 2 * 10**9 for 2 GB, 2 << 30 for 2 GiB)"


@dataclass(frozen=True, kw_only=True)
class StarKVConfig:
    """Options of the `starkv` backend. The policy scores the tokens and has its own options.

    The default policy comes from this project. `StarKVConfig.paper()` is STaR-KV as its authors
    released it (arXiv 2606.01790).

    Raises:
        OptionError: a value is impossible.
    """

    budget: float = number(0.2, above=0, most=1, hint=_budget_hint)
    """Share of all tokens seen that stays in the cache, the window included: 0 < budget <= 1."""

    budget_tokens: int | None = integer(None, least=2)
    """Each layer keeps at most this many tokens, at any prompt length. Replaces `budget`."""

    budget_bytes: int | None = integer(None, least=1, hint=_bytes_hint)
    """After a prompt, the keys and values of all compressed layers and batch rows together hold at
    most this many bytes, free slots of `decode_tokens` included. Replaces `budget` and
    `budget_tokens`. Two things do not count: layers that stay uncompressed (sliding windows), and
    tokens decoded without `decode_tokens`, until the next prompt."""

    layer_budgets: tuple[float, ...] | None = None
    """One number above 0 for each compressed layer, first to last. Beyond the window, layers keep
    tokens in these proportions; the total is that of the budget. None: all layers keep the same
    number, unless the policy has a rule. A cache with this option takes one prompt, without
    padding."""

    decode_tokens: int | None = integer(None, least=1)
    """Decoding writes into buffers with room for this many tokens. Their addresses and shapes stay
    the same from token to token. A full buffer is replaced by one with as much room again. None:
    the cache grows by one token at a time."""

    window: int = integer(8, least=1, most=64)
    """Number of last tokens that always stay, and whose queries score the others [W]. 1 to 64."""

    nbits: int = one_of(16, (16, 8, 4))
    """Bits in which the cache stores each number of the kept tokens' keys and values: 16 stands for
    the model's precision, 8 and 4 for codes, with 32 bits more for each token and head. The window
    and the tokens decoded since the last prompt stay in the model's precision."""

    policy: PolicyOrName = PolicyOrName()
    """The policy that scores the tokens: a `starkv_compile.policies.Policy`, or the name of one
    with its default options."""

    inner: str = choice("inductor", INNER_BACKENDS)
    """Backend that compiles the rewritten graph: "inductor", "aot_eager", "eager", or "tensorrt"
    (torch-tensorrt)."""

    regional_compilation: bool = flag(True)
    """Inductor and aot_eager compile layers that are alike once, and a graph calls the result for
    each of them. So only tracing takes longer with more layers. False: each graph is compiled as a
    whole, as at a budget of 1.0, where gradients are recorded, with Inductor's modes, freezing and
    CUDA graphs, and where Dynamo stores what it compiled (`aot_compile`,
    TORCH_CACHING_PRECOMPILE)."""

    shorten_outputs: bool = flag(False)
    """Shortens keys and values that a graph returns, for code that keeps its own cache. Your code
    then counts positions on from the uncompressed length, and makes masks as long as the cache.
    Needs `torch.compile(..., fullgraph=True)`. A Hugging Face cache needs no such option."""

    debug: bool = flag(False)
    """Raises `NonFiniteScores`, which names the layer, when a query or key is NaN or infinite.
    Needs inner="eager" and costs host synchronisations."""

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_names_of_options()
        self._check_one_budget()
        self._check_layer_budgets()
        if self.decode_tokens is not None and self.is_uneven:
            why = "layer_budgets" if self.layer_budgets else f"policy={self.policy.name!r}"
            raise OptionError(
                f"decode_tokens={self.decode_tokens} with {why}: layers store different numbers of "
                "tokens, but buffers need the same next slot in all layers; leave out decode_tokens"
            )
        if self.nbits != 16 and self.shorten_outputs:
            raise OptionError(
                f"nbits={self.nbits} with shorten_outputs=True: a graph returns keys and values in "
                "the model's precision, and your code stores them; leave out nbits"
            )
        if self.debug and self.inner != "eager":
            raise OptionError(
                f"debug=True with inner={self.inner!r}: the check reads values on the host; use "
                'inner="eager" with it'
            )

    def _check_names_of_options(self) -> None:
        own = {field.name for field in dataclasses.fields(self)}
        twice = sorted(own & set(self.policy.options()))
        if twice:
            raise OptionError(
                f"policy={self.policy.name!r} has an option {twice[0]!r}, which is an option of "
                "StarKVConfig too; rename the policy's field, as flat options hold both"
            )

    def _check_layer_budgets(self) -> None:
        given = self.layer_budgets
        if given is None:
            return
        numbers = isinstance(given, (tuple, list)) and all(map(is_number, given))
        if not numbers or not given or min(given) <= 0:
            raise OptionError(
                f"layer_budgets={given!r}: expected a number above 0 for each compressed layer, "
                "such as (3, 2, 1)"
            )
        object.__setattr__(self, "layer_budgets", tuple(map(float, given)))

    def _check_one_budget(self) -> None:
        kinds = ("budget_bytes", "budget_tokens", "budget")
        given = [name for name in kinds if name in self._changes()]
        if len(given) > 1:
            first, other = given[:2]
            raise OptionError(
                f"{first}={getattr(self, first)} with {other}={getattr(self, other)}: a "
                f"configuration has one budget; leave out {other}"
            )

    @classmethod
    def paper(cls, **changes: Unpack[Options]) -> StarKVConfig:
        """Returns STaR-KV as its authors released it (arXiv 2606.01790).

        Args:
            changes: flat options, which override those of the release.

        Raises:
            OptionError: an option is unknown or impossible.
        """
        if changes.get("policy", "starkv") != "starkv":
            raise OptionError(
                f"policy={changes['policy']!r} with paper(): the paper's is policy 'starkv'; leave "
                "out the policy, or use StarKVConfig(policy=...)"
            )
        paper = {"policy": "starkv", "entropy": "global", "grid": "square"}
        return cls.from_options({**paper, **changes})

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> StarKVConfig:
        """Returns the configuration for the flat `options` of `torch.compile`.

        Args:
            options: values of this class and of the policy, in one mapping. None: the defaults.

        Raises:
            OptionError: an option is unknown or impossible, or the policy does not read it.
        """
        from .policies import policy_of

        options = dict(options or {})
        own = [field.name for field in dataclasses.fields(cls)]
        of_policy = {name: value for name, value in options.items() if name not in own}
        policy = policy_of(options.get("policy", DEFAULT_POLICY), of_policy, own)
        kept = {name: value for name, value in options.items() if name in own}
        return cls(**{**kept, "policy": policy})

    def to_options(self) -> dict[str, Any]:
        """Returns the values that differ from the defaults, as flat `options` for `torch.compile`.

        If the class of the policy is not registered under a name, the option `policy` is the
        instance.
        """
        from .policies import name_of

        options = self._changes()
        name = name_of(self.policy)
        if name is None:
            return {**options, "policy": self.policy}
        named = {} if name == DEFAULT_POLICY else {"policy": name}
        return {**options, **named, **self.policy.changed_options()}

    def describe(self) -> dict[str, Any]:
        """Returns every value, defaults included, in one flat mapping that fits into JSON.

        The policy is its registered name, else the module and the name of its class.
        """
        from .policies import address_of

        own = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "policy"
        }
        return {**own, "policy": address_of(self.policy), **dataclasses.asdict(self.policy)}

    def _changes(self) -> dict[str, Any]:
        """The values that differ from the defaults, without the policy."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "policy" and getattr(self, field.name) != field.default
        }

    @property
    def keeps_everything(self) -> bool:
        """Whether every token stays in the cache. Then graphs stay as they are."""
        return self.budget == 1.0 and self.budget_tokens is None and self.budget_bytes is None

    @property
    def leaves_cache(self) -> bool:
        """Whether the cache can stay the default one of transformers."""
        return self.keeps_everything and self.decode_tokens is None and self.nbits == 16

    @property
    def fraction(self) -> Fraction:
        """`budget` as the fraction its decimal form means: 0.2 is 1/5, and 1 / 3 is 1/3.

        At most nine digits, so that no product with a number of tokens leaves 64 bits in a graph.
        """
        least = Fraction(1, 10**9)
        return max(least, Fraction(str(self.budget)).limit_denominator(least.denominator))

    @property
    def scoring_window(self) -> int:
        """Number of last tokens that score the others and stay: the policy's, or `window`."""
        return self.policy.fixed_window or self.window

    @property
    def is_uneven(self) -> bool:
        """Whether layers keep different numbers of tokens, in the same total."""
        return self.layer_budgets is not None or self.policy.uneven

    def layer_weights(self, layers: int) -> tuple[int, ...]:
        """Returns what each layer keeps beyond its window, in proportion, where `is_uneven`.

        Raises:
            OptionError: `layer_budgets` is for another number of layers.
        """
        given = self.layer_budgets
        if given is None:
            return self._policy_weights(layers)
        if len(given) != layers:
            raise OptionError(
                f"layer_budgets has {len(given)} values, but {layers} layers are compressed; give "
                "one for each, first to last"
            )
        return tuple(max(1, round(LAYER_STEPS * budget / max(given))) for budget in given)

    def _policy_weights(self, layers: int) -> tuple[int, ...]:
        weights = tuple(self.policy.layer_weights(layers))
        if len(weights) != layers or not all(type(w) is int and w > 0 for w in weights):
            raise OptionError(
                f"policy={self.policy.name!r}: layer_weights({layers}) gave {weights!r:.90}; "
                "expected a whole number above 0 for each layer"
            )
        return weights

    def capacity(self, seen: int, token_bytes: TokenBytes | None = None) -> int:
        """Returns how many of `seen` tokens stay, the window included.

        That is floor(seen * budget), or `budget_tokens`, or what `budget_bytes` has room for. The
        arithmetic is on integers only, because `seen` may be a symbolic length.

        Args:
            seen: tokens of the session so far.
            token_bytes: what tokens take in all compressed layers and batch rows. Needed with
                `budget_bytes` only.

        Raises:
            OptionError: `budget_bytes` without `token_bytes`.
        """
        if self.budget_bytes is not None:
            if token_bytes is None:
                raise OptionError(
                    f"budget_bytes={self.budget_bytes}: the number of tokens depends on the model, "
                    "and there is no model here; use budget_tokens"
                )
            slots = self.decode_tokens or 0
            tokens = self.budget_bytes // token_bytes.full - slots
            if self.nbits == 16:
                return tokens
            from .kernels.reference.capacity import least, most

            in_full = self.scoring_window  # and where there is no room for codes, all tokens are
            room = self.budget_bytes - token_bytes.shared - (in_full + slots) * token_bytes.full
            return most(in_full + room // token_bytes.coded, least(in_full, tokens))
        if self.budget_tokens is not None:
            return self.budget_tokens
        return seen * self.fraction.numerator // self.fraction.denominator


__all__ = ["DEFAULT_POLICY", "INNER_BACKENDS", "StarKVConfig"]
