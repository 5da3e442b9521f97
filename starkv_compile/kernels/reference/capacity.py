"""How many tokens are kept. Integer arithmetic only, so it works on symbolic lengths."""

from __future__ import annotations


def clip_window(window: int, capacity: int, length: int) -> int:
    """The window that fits: max(1, min(window, capacity - 2)), and shorter than `length`."""
    if capacity - 2 < window:
        window = max(1, capacity - 2)
    return window if window < length else length - 1


def checked_window(window: int, capacity: int, length: int, queries: int) -> int:
    """`clip_window`, of as many queries at least.

    Raises:
        ValueError: there are fewer queries.
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
    if capacity >= length:
        return length - window, window
    return max(1, capacity - window), window
