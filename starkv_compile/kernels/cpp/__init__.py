"""The same functions as `kernels.reference`, as C++ for the CPU, where that beats what Inductor
makes of the reference: it cannot sum what a product gives before it has stored all of it.

Compiled by Inductor's own compiler when first run, and cached where Inductor caches.
"""

from .window_attention import window_attention

__all__ = ["window_attention"]
