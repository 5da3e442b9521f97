"""Pure-tensor implementations, batch first, without data-dependent Python. They define every op.

Selection and compaction are exact. Scores are float32 for models of any dtype.
"""

from .attention import window_attention
from .capacity import layer_capacity, split_capacity
from .novelty import key_novelty, spatial_novelty, temporal_novelty
from .quantization import TokenBytes, centre_of, codes_and_ranges, row_bytes
from .quantized_attention import attend_codes
from .selection import best_first, gather_kv, select_tokens
from .spatial import rank_histogram
from .star import Scores

__all__ = [
    "Scores",
    "TokenBytes",
    "attend_codes",
    "best_first",
    "centre_of",
    "codes_and_ranges",
    "gather_kv",
    "key_novelty",
    "layer_capacity",
    "rank_histogram",
    "row_bytes",
    "select_tokens",
    "spatial_novelty",
    "split_capacity",
    "temporal_novelty",
    "window_attention",
]
