"""The same functions as `kernels.reference` for graphs that are compiled to run here, on a CPU.

C++ for what Inductor makes slow of the reference: it cannot sum what a product gives before all of
it is stored, and it ranks and selects by sorting. And for what it compiles for long: novelty's
comparisons of keys at places that other tensors name. Compiled by Inductor's own compiler when
first run, and cached where Inductor caches.
"""

from ..reference.selection import gather_kv
from .ops import (
    attend_codes,
    centre_of,
    codes_and_ranges,
    key_novelty,
    rank_histogram,
    select_tokens,
    spatial_novelty,
    temporal_novelty,
    window_attention,
)

__all__ = [
    "attend_codes",
    "centre_of",
    "codes_and_ranges",
    "gather_kv",
    "key_novelty",
    "rank_histogram",
    "select_tokens",
    "spatial_novelty",
    "temporal_novelty",
    "window_attention",
]
