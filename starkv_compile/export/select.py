"""Selection in forms that ONNX has operators for. Same result as `reference.select_tokens`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..config import StarKVConfig
from ..errors import OptionError
from ..kernels.reference.capacity import split_capacity
from ..kernels.reference.selection import rank
from .threshold import among_largest, compacted

Body = Callable[..., torch.Tensor]

TENSORRT_TOPK = 3840
"""The largest K of TensorRT's TopK. A build with a larger one in its profile only warns."""


def select_by_topk(
    scores: torch.Tensor, real: torch.Tensor | None, length: int, window: int, capacity: int
) -> torch.Tensor:
    """`reference.select_tokens` by TopK, whose ties ONNX gives to the lowest index.

    (torch.topk does not say who gets a tie: only the exported graph is exact on those.)
    """
    selected, _ = split_capacity(length, window, capacity)
    best = rank(scores, real).topk(selected).indices
    return _with_window(best.sort(dim=-1).values, scores.shape[-1], length)


def select_by_threshold(
    scores: torch.Tensor, real: torch.Tensor | None, length: int, window: int, capacity: int
) -> torch.Tensor:
    """The same by counting: no TopK, whose K TensorRT limits, and no sort."""
    selected, _ = split_capacity(length, window, capacity)
    wanted = torch.full_like(scores[:, :1], selected, dtype=torch.int64)
    chosen = among_largest(rank(scores, real), wanted)[:, 0]
    return _with_window(compacted(chosen, selected), scores.shape[-1], length)


def _with_window(best: torch.Tensor, past: int, length: int) -> torch.Tensor:
    tail = torch.arange(past, length, device=best.device).expand(best.shape[0], -1)
    return torch.cat([best, tail], dim=-1)


SELECTIONS: dict[str, Body] = {"topk": select_by_topk, "threshold": select_by_threshold}
"""By name of the form."""


def chosen(name: str, config: StarKVConfig, max_seq: int) -> str:
    """`name`; of "auto", the form that TensorRT can run at `max_seq` tokens, if there is one.

    A frame can be nearly as long as the prompt, and mutual information sorts it.

    Raises:
        OptionError: no such form, or not of this policy.
    """
    if name not in ("auto", *SELECTIONS):
        raise OptionError(f"select={name!r}: expected one of auto, {', '.join(SELECTIONS)}")
    if ranks_all(config):
        if name == "threshold":
            raise OptionError(
                f"select='threshold' with policy={config.policy!r}, which ranks all tokens and so "
                "has no such form yet; leave select out, or give policy='starkv'"
            )
        return "topk"
    if name == "auto":
        return "topk" if max_seq <= TENSORRT_TOPK else "threshold"
    return name


def ranks_all(config: StarKVConfig) -> bool:
    """Whether scoring sorts all tokens, which TensorRT can do with `TENSORRT_TOPK` at most."""
    return config.policy == "screen_novelty"
