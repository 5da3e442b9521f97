"""Policies score tokens. Selection and compaction are the same for all of them.

A policy is a frozen dataclass. Its fields are its options. Its method `score` gives every token a
score. docs/guides/policies.md compares them; docs/guides/writing-a-policy.md shows how to add one.
"""

from __future__ import annotations

from ..validation import choice, flag, integer, number
from .age_decay import AgeDecay
from .base import Policy, PooledPolicy
from .current_frame import CurrentFrame
from .expected_attention import ExpectedAttention
from .gui_kv import GuiKV
from .inputs import Scored, ScoreInputs
from .key_novelty import KeyNovelty
from .layer_density import measure_layer_budgets
from .mixkv import MixKV
from .pyramidkv import PyramidKV
from .random import Random
from .registry import POLICIES, address_of, find_policy, name_of, policy_names, policy_of
from .screen_novelty import ScreenNovelty
from .snapkv import SnapKV
from .snapkv_boost import SnapKVBoost
from .snapkv_mean import SnapKVMean
from .st_lite import STLite
from .starkv import StarKV
from .streaming_llm import StreamingLLM
from .tova import Tova
from .vl_cache import VLCache

__all__ = [
    "POLICIES",
    "AgeDecay",
    "CurrentFrame",
    "ExpectedAttention",
    "GuiKV",
    "KeyNovelty",
    "MixKV",
    "Policy",
    "PooledPolicy",
    "PyramidKV",
    "Random",
    "STLite",
    "ScoreInputs",
    "Scored",
    "ScreenNovelty",
    "SnapKV",
    "SnapKVBoost",
    "SnapKVMean",
    "StarKV",
    "StreamingLLM",
    "Tova",
    "VLCache",
    "address_of",
    "choice",
    "find_policy",
    "flag",
    "integer",
    "measure_layer_budgets",
    "name_of",
    "number",
    "policy_names",
    "policy_of",
]
