"""Lists the variants that are compared, one line of `VARIANTS` each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from starkv_compile import StarKVConfig

BUDGETS = (0.4, 0.2, 0.1, 0.05, 0.03)
DENSITY = (0.06, 0.15, 0.18, 0.32)
"""Result of `measure_layer_budgets` for the demo agent's layers, the mean of six prompts."""

Chunk: TypeAlias = int | Literal["screen"]
SCREEN: Literal["screen"] = "screen"


@dataclass(frozen=True)
class Variant:
    """Gives a configuration a name and a title.

    make: makes the configuration from `budget` and `inner`. group: "policy", "ablation" for one
    change to the paper's method, "own" for one change to our default, "chunks" for a prompt that
    is read in parts, or "bits" for kept tokens in few bits. by_need: True for the oracle, which is
    the upper limit. It knows what the questions need, so of `make` only the capacity counts. chunk:
    tokens of each part, each compacted before the next is read (`prefill_chunk_size` of
    transformers), or SCREEN for one screen at a time; None: one part. nbits: bits of the kept
    tokens. of: the variant that stores the same tokens in 16 bits.
    """

    name: str
    title: str
    make: Callable[..., StarKVConfig]
    group: str = "policy"
    by_need: bool = False
    chunk: Chunk | None = None
    nbits: int = 16
    of: str = ""

    def config(self, budget: float) -> StarKVConfig:
        return self.make(budget=budget, inner="eager")


def _flat(**options: Any) -> StarKVConfig:
    return StarKVConfig.from_options(options)


def _changed(name: str, title: str, **options: Any) -> Variant:
    return Variant(name, f"paper, {title}", partial(StarKVConfig.paper, **options), "ablation")


def _own(name: str, title: str, **options: Any) -> Variant:
    return Variant(name, f"ours, {title}", partial(_flat, **options), "own")


def _in_chunks(policy: str, title: str) -> list[Variant]:
    """A screenshot of the agent has 99 tokens: chunks of a half, three quarters, one and a half."""
    make = partial(_flat, policy=policy)
    titles = {n: f"in chunks of {n} tokens" for n in (50, 75, 150)} | {SCREEN: "screen by screen"}
    return [
        Variant(f"{policy}-chunk-{n}", f"{title}, {how}", make, "chunks", chunk=n)
        for n, how in titles.items()
    ]


def _in_bits(policy: str, title: str, of: str = "") -> list[Variant]:
    return [
        Variant(
            f"{policy}-{nbits}-bits",
            f"{title}, {nbits} bits",
            partial(_flat, policy=policy, nbits=nbits),
            "bits",
            nbits=nbits,
            of=of or policy,
        )
        for nbits in (8, 4)
    ]


def policy_variant(policy: str, title: str, name: str = "", **options: Any) -> Variant:
    """Returns the variant of a registered policy with some of its options changed."""
    return Variant(name or policy, title, partial(_flat, policy=policy, **options))


FULL = Variant("full", "full cache", StarKVConfig)
"""The variant that the others are compared with. Its only budget is 1.0."""

_ALL = (
    FULL,
    Variant("oracle", "oracle: knows what is needed", StarKVConfig, by_need=True),
    Variant("default", "screen novelty (our default)", StarKVConfig),
    policy_variant("starkv", "STaR-KV, our options"),
    Variant("paper", "STaR-KV, the paper's options", StarKVConfig.paper),
    policy_variant("snapkv", "SnapKV, a set for each KV head"),
    policy_variant("snapkv_mean", "SnapKV, mean over heads"),
    policy_variant("snapkv_boost", "SnapKV, mean over heads, with boost"),
    policy_variant("pyramidkv", "PyramidKV"),
    policy_variant("mixkv", "MixKV on SnapKV"),
    policy_variant("vl_cache", "VL-Cache, one budget for all layers"),
    policy_variant(
        "vl_cache", "VL-Cache, budgets by layer", "vl_cache-layers", layer_budgets=DENSITY
    ),
    policy_variant("gui_kv", "GUI-KV"),
    policy_variant("st_lite", "ST-Lite"),
    policy_variant("key_novelty", "attention + key novelty"),
    policy_variant("age_decay", "age decay"),
    policy_variant("current_frame", "current frame and text"),
    policy_variant("expected_attention", "expected attention"),
    policy_variant("tova", "TOVA"),
    policy_variant("streaming_llm", "StreamingLLM"),
    policy_variant("random", "random"),
    policy_variant(
        "snapkv_mean", "SnapKV, mean over heads, not pooled", "snapkv_mean-pool-1", pool=1
    ),
    policy_variant("snapkv", "SnapKV, a set for each KV head, not pooled", "snapkv-pool-1", pool=1),
    policy_variant(
        "key_novelty", "attention + key novelty, not pooled", "key_novelty-pool-1", pool=1
    ),
    policy_variant("starkv", "STaR-KV, our options, not pooled", "starkv-pool-1", pool=1),
    _changed("grid-true", "the screens' own grid", grid="true"),
    _changed("entropy-subspace", "entropy reshapes each subspace", entropy="subspace"),
    _changed("entropy-off", "no entropy", entropy="off"),
    _changed("boost-0", "no boost of the current frame", boost=0.0),
    _changed("boost-0.25", "boost 0.25", boost=0.25),
    _changed("boost-0.5", "boost 0.5", boost=0.5),
    _changed("boost-1", "boost 1", boost=1.0),
    _changed("boost-4", "boost 4", boost=4.0),
    _changed("mi-at-once", "spatial prior from the first step", mi_warm_steps=0, mi_ramp_steps=1),
    _changed(
        "mi-whole",
        "only the spatial prior, from the first step",
        mi_weight=1.0,
        mi_warm_steps=0,
        mi_ramp_steps=1,
    ),
    _changed(
        "mi-whole-true",
        "only the spatial prior, on the screens' own grid",
        mi_weight=1.0,
        mi_warm_steps=0,
        mi_ramp_steps=1,
        grid="true",
    ),
    _changed("decay-0", "no discount of older frames", frame_decay=0.0),
    _changed("decay-0.3", "discount 0.3 per frame", frame_decay=0.3),
    _changed("pool-1", "scores not pooled", pool=1),
    _changed("pool-3", "scores pooled over 3 tokens", pool=3),
    _changed("pool-1-boost-0", "scores not pooled, no boost", pool=1, boost=0.0),
    _changed("window-4", "window 4", window=4),
    _changed("window-16", "window 16", window=16),
    _changed("window-32", "window 32", window=32),
    _changed("layers", "VL-Cache's budgets by layer", layer_budgets=DENSITY),
    _own("own-layers", "VL-Cache's budgets by layer", layer_budgets=DENSITY),
    _own("own-attention-0", "no attention in the scores of screens", attention_weight=0.0),
    _own("own-attention-2", "attention weight 2", attention_weight=2.0),
    _own("own-stored-1", "attention to screens of earlier turns, too", stored_attention=True),
    _own("own-text-1", "text weight 1", text_weight=1.0),
    _own("own-text-4", "text weight 4", text_weight=4.0),
    _own("own-novelty-0", "text scored by attention only", novelty_weight=0.0),
    _own("own-pool-1", "text not pooled", pool=1),
    _own("own-window-4", "window 4", window=4),
    _own("own-window-16", "window 16", window=16),
    *_in_chunks("screen_novelty", "screen novelty"),
    *_in_chunks("st_lite", "ST-Lite"),
    *_in_bits("screen_novelty", "screen novelty", "default"),
    *_in_bits("st_lite", "ST-Lite"),
    *_in_bits("snapkv", "SnapKV"),
    *_in_bits("random", "random"),
)

VARIANTS = {variant.name: variant for variant in _ALL}


def title_of(name: str) -> str:
    """Returns the title, or the name itself of a variant that no longer exists."""
    return VARIANTS[name].title if name in VARIANTS else name


def group_of(name: str) -> str:
    """Returns the group, or "" for a variant that no longer exists."""
    return VARIANTS[name].group if name in VARIANTS else ""
