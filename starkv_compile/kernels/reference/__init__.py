"""Pure-tensor implementations, batch first, no data-dependent Python: the meaning of every op.

Selection and compaction are exact; scores are float32 whatever the model's dtype.
"""

from .attention import window_attention
from .capacity import layer_capacity, split_capacity
from .selection import best_first, gather_kv, select_tokens
from .spatial import rank_histogram
from .star import Scores

__all__ = [
    "Scores",
    "best_first",
    "gather_kv",
    "layer_capacity",
    "rank_histogram",
    "select_tokens",
    "split_capacity",
    "window_attention",
]
