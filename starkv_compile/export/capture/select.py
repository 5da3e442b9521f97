"""Selection with operators that ONNX has. The result equals `reference.select_tokens`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...errors import OptionError
from ...kernels.reference.capacity import split_capacity
from ...kernels.reference.selection import rank
from .threshold import among_largest, compacted

Body = Callable[..., torch.Tensor]

TENSORRT_TOPK = 3840
"""The largest K of TensorRT's TopK. A build with a larger K in its profile only warns."""


def select_by_topk(
    scores: torch.Tensor, real: torch.Tensor | None, length: int, window: int, capacity: int
) -> torch.Tensor:
    """`reference.select_tokens` with TopK. ONNX gives its ties to the lowest index.

    (torch.topk does not specify ties, so only the exported graph is exact on them.)
    """
    selected, _ = split_capacity(length, window, capacity)
    best = rank(scores, real).topk(selected).indices
    return _with_window(best.sort(dim=-1).values, scores.shape[-1], length)


def select_by_threshold(
    scores: torch.Tensor, real: torch.Tensor | None, length: int, window: int, capacity: int
) -> torch.Tensor:
    """The same by counting, without a sort and without TopK, whose K TensorRT limits."""
    selected, _ = split_capacity(length, window, capacity)
    wanted = torch.full_like(scores[:, :1], selected, dtype=torch.int64)
    chosen = among_largest(rank(scores, real), wanted)[:, 0]
    return _with_window(compacted(chosen, selected), scores.shape[-1], length)


def _with_window(best: torch.Tensor, past: int, length: int) -> torch.Tensor:
    tail = torch.arange(past, length, device=best.device).expand(best.shape[0], -1)
    return torch.cat([best, tail], dim=-1)


SELECTIONS: dict[str, Body] = {"topk": select_by_topk, "threshold": select_by_threshold}
"""The function for each form of selection."""


def best_by_threshold(
    scores: torch.Tensor, kinds: list[torch.Tensor], quotas: list[torch.Tensor]
) -> torch.Tensor:
    """`reference.novelty.best_by_sort` without a sort of all tokens, for every selection form."""
    found = torch.zeros_like(kinds[0])
    for kind, quota in zip(kinds, quotas, strict=True):
        among = among_largest(scores.masked_fill(~kind, -1.0), quota.clamp(min=1))[:, 0]
        found = found | (among & kind & (quota > 0))
    return found


def chosen(name: str, max_seq: int) -> str:
    """Returns `name`; for "auto", the form that TensorRT can run at `max_seq` tokens.

    A frame can be nearly as long as the prompt, and mutual information sorts it.

    Raises:
        OptionError: there is no such form.
    """
    if name == "auto":
        return "topk" if max_seq <= TENSORRT_TOPK else "threshold"
    if name not in SELECTIONS:
        raise OptionError(f"select={name!r}: expected one of auto, {', '.join(SELECTIONS)}")
    return name
