"""How many tokens stay. Integer arithmetic only, so it works on symbolic lengths."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch

_every_length: ContextVar[bool] = ContextVar("_every_length", default=False)


@contextlib.contextmanager
def every_length() -> Iterator[None]:
    """Traces for all lengths at once: inside, minima stay in the graph.

    Elsewhere a minimum is decided at tracing. A compiler checks such decisions when a graph is
    called, and compiles another graph. An exported graph is called with any length and checks
    nothing.
    """
    token = _every_length.set(True)
    try:
        yield
    finally:
        _every_length.reset(token)


def least(a: int, b: int) -> int:
    """min(a, b); a value of the graph under `every_length`."""
    if _every_length.get():
        return torch.sym_min(a, b)
    return a if a <= b else b


def most(a: int, b: int) -> int:
    """max(a, b); a value of the graph under `every_length`."""
    if _every_length.get():
        return torch.sym_max(a, b)
    return a if a >= b else b


def clip_window(window: int, capacity: int, length: int) -> int:
    """The window that fits: max(1, min(window, capacity - 2)), and shorter than `length`."""
    return least(most(1, least(window, capacity - 2)), length - 1)


def checked_window(window: int, capacity: int, length: int, queries: int) -> int:
    """`clip_window`, checked against the number of queries.

    Raises:
        ValueError: there are fewer queries than the window has tokens.
    """
    window = clip_window(window, capacity, length)
    if queries < window:
        raise ValueError(f"window of {window} tokens, but only {queries} queries")
    return window


def split_capacity(length: int, window: int, capacity: int) -> tuple[int, int]:
    """(selected, window) of `length` >= 2 stored tokens: selected = max(1, min(C - W, L - W)).

    The number kept is their sum: exactly C where 3 <= C <= L, all of them where C > L, and 2
    where C < 3.
    """
    window = clip_window(window, capacity, length)
    return most(1, least(capacity - window, length - window)), window


def layer_capacity(
    length: int, window: int, capacity: int, weights: Sequence[int], layer: int
) -> int:
    """C of one layer if layers divide by weight what they keep beyond their windows.

    All layers together keep exactly as many tokens as with `capacity` each. If the largest would
    keep more than there are, all move nearer to the mean until the largest keeps everything.

    Args:
        length: L. window: W before clipping. capacity: mean C, before clipping to L.
        weights: whole numbers, not all zero, of all layers. layer: which of them.
    """
    capacity = least(capacity, length)
    window = clip_window(window, capacity, length)
    mean, layers, total = capacity - window, len(weights), sum(weights)
    above = [layers * weight - total for weight in weights]  # the mean, in 1 / total of it
    if not any(above):
        return capacity
    unit = math.gcd(total, *above)
    total, above = total // unit, [part // unit for part in above]
    largest = max(above)
    stretch = least(mean * largest, (length - window - mean) * total)

    def up_to(layers: int) -> int:
        """What this many layers keep together. It rounds the sum, so rounding never adds up."""
        return mean * layers + stretch * sum(above[:layers]) // (largest * total)

    return window + up_to(layer + 1) - up_to(layer)
