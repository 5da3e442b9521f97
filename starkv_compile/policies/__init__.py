"""Policies: how tokens are scored. Selection and compaction are the same for all of them.

A policy is built from a `StarKVConfig` and has one method, `score`. It is called while a graph
is rewritten, on proxies of the graph's values, so it may use torch functions and `torch.ops`,
index tuples, and no Python control flow on values or shapes. To add one: a class in a file of
its own, and a line in `POLICIES`. `docs/policies.md` compares them.
"""

from __future__ import annotations

from .age_decay import AgeDecay
from .base import Policy
from .current_frame import CurrentFrame
from .expected_attention import ExpectedAttention
from .gui_kv import GuiKV
from .inputs import Scored, ScoreInputs
from .key_novelty import KeyNovelty
from .layer_density import measure_layer_budgets
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

POLICIES: dict[str, type[Policy]] = {
    "screen_novelty": ScreenNovelty,
    "starkv": StarKV,
    "snapkv": SnapKV,
    "snapkv_mean": SnapKVMean,
    "snapkv_boost": SnapKVBoost,
    "pyramidkv": PyramidKV,
    "vl_cache": VLCache,
    "gui_kv": GuiKV,
    "st_lite": STLite,
    "key_novelty": KeyNovelty,
    "age_decay": AgeDecay,
    "current_frame": CurrentFrame,
    "expected_attention": ExpectedAttention,
    "tova": Tova,
    "streaming_llm": StreamingLLM,
    "random": Random,
}

__all__ = [
    "POLICIES",
    "Policy",
    "ScoreInputs",
    "Scored",
    "ScreenNovelty",
    "StarKV",
    "measure_layer_budgets",
]
