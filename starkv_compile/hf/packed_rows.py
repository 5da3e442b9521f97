"""Keeps FlashAttention of transformers in one graph with the cache write.

Before each such attention, transformers reads the values of the positions to see whether several
sequences are packed into one row. Dynamo breaks the graph there: the cache write is then in one
graph and the attention in the next, and no pass can score the tokens.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

_LIBRARY = "transformers.modeling_flash_attention_utils"
_QUESTION = "_is_packed_sequence"
_lock = threading.Lock()
_open: list[Any] = []
"""The function that each call in progress found in the library. The first is the library's own."""


def is_packed(position_ids: Any, attention_mask: Any) -> bool:
    """Whether the positions of a single row [1, S] without padding start again."""
    if not isinstance(position_ids, torch.Tensor) or position_ids.dim() != 2:
        return False
    if isinstance(attention_mask, torch.Tensor) and not bool(attention_mask.all()):
        return False
    return len(position_ids) == 1 and bool((position_ids.diff() < 0).any())


@contextlib.contextmanager
def known_as_unpacked(known: bool) -> Iterator[None]:
    """If the rows are `known` to be unpacked, the library does not check them inside the block."""
    library = sys.modules.get(_LIBRARY)
    if not known or not hasattr(library, _QUESTION):
        yield
        return
    with _lock:
        _open.append(getattr(library, _QUESTION))
        setattr(library, _QUESTION, _no)
    try:
        yield
    finally:
        with _lock:  # calls of several threads overlap: the last one out puts the first's back
            asked = _open.pop()
            if not _open:
                setattr(library, _QUESTION, asked)


def _no(position_ids: Any, batch_size: int) -> bool:
    return False
