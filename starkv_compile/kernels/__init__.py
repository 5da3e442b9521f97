"""Scoring and compaction, as pure-tensor reference functions and as registered torch ops.

`reference/` is the specification; `ops` registers it under `torch.ops.starkv`.

Shape legend, used everywhere:

    B  batch rows            H  query heads           G  KV heads ("subspaces")
    S  new tokens (queries)  L  stored keys, S included
    W  window: the last queries, always kept          P = L - W, what is scored
    N  tokens of the current frame, padded to the widest row
    C  capacity: tokens kept in all, window included  D  head dim    E  hidden dim
"""

from __future__ import annotations

from .ops import STARKV

__all__ = ["STARKV"]
