"""The same functions as `kernels.reference`, as Triton kernels for CUDA and ROCm devices.

Imported when a device tensor is first scored; nothing here is needed on a machine without one.
No program waits for another and no floating-point value is added atomically, so results do not
depend on the order in which programs run.
"""

from ..reference.novelty import key_novelty, spatial_novelty, temporal_novelty
from ..reference.quantization import centre_of, codes_and_ranges
from .attend_codes import attend_codes
from .gather_kv import gather_kv
from .rank_histogram import rank_histogram
from .select_tokens import select_tokens
from .window_attention import window_attention

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
