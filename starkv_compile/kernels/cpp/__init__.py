"""The same functions as `kernels.reference` for graphs that are compiled to run here, on a CPU.

C++ for what Inductor makes slow of the reference: it cannot sum what a product gives before all of
it is stored, and it ranks and selects by sorting. Compiled by Inductor's own compiler when first
run, and cached where Inductor caches.
"""

from ..reference.selection import gather_kv
from .ops import (
    attend_codes,
    centre_of,
    codes_and_ranges,
    rank_histogram,
    select_tokens,
    window_attention,
)

__all__ = [
    "attend_codes",
    "centre_of",
    "codes_and_ranges",
    "gather_kv",
    "rank_histogram",
    "select_tokens",
    "window_attention",
]
