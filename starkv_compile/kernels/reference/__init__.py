"""Pure-tensor implementations, batch first, no data-dependent Python: the meaning of every op.

Selection and compaction are exact; scores are float32 whatever the model's dtype.
"""

from .attention import window_attention
from .selection import gather_kv, select_tokens
from .spatial import rank_histogram

__all__ = ["gather_kv", "rank_histogram", "select_tokens", "window_attention"]
