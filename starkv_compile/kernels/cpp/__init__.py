"""Some functions of `kernels.reference` as C++ for the CPU: those that Inductor makes slow.

It cannot sum what a product gives before all of it is stored, and it selects by sorting. Compiled
by Inductor's own compiler when first run, and cached where Inductor caches.
"""

from .select_tokens import select_tokens
from .window_attention import window_attention

__all__ = ["select_tokens", "window_attention"]
