"""The uncompiled model, whose attention does not see what a compressed cache has dropped."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from starkv_compile import UnsupportedModel

from .sessions import Run, Stored

NAME = "starkv_verify"
ROWS = 256  # queries at once: all rows of a long prompt would take gigabytes


class Oracle:
    """Attention over a full cache that hides the tokens which `run` had dropped.

    It shares no code with the compressed cache, its kernels, its positions and its masks.

    Args:
        run: a compressed session. The oracle's session makes the same calls.
        exact: computes in float32 by two products and a softmax, in place of the model's own
            attention. Where the model's attention is another function (soft-capped logits, sinks),
            its own remains.
    """

    def __init__(self, run: Run, exact: bool) -> None:
        self.run, self.exact = run, exact
        self.calls = 0  # that are finished
        self.used = False
        self.own = "sdpa"

    def next_call(self, _: Run) -> None:
        self.calls += 1

    @contextlib.contextmanager
    def inside(self, model: Any) -> Iterator[None]:
        """Replaces the attention of the language model in a block.

        Raises:
            UnsupportedModel: it does not take its attention from transformers'
                `AttentionInterface`.
        """
        decoder = _decoder(model)
        before = getattr(decoder.config, "_attn_implementation", None)
        self.own = "eager" if before == "eager" else "sdpa"
        AttentionInterface.register(NAME, self.attend)
        AttentionMaskInterface.register(NAME, eager_mask if self.own == "eager" else sdpa_mask)
        try:
            decoder.set_attn_implementation(NAME)
        except (AttributeError, ValueError) as error:
            raise UnsupportedModel(_no_interface(decoder)) from error
        try:
            yield
        finally:
            decoder.set_attn_implementation(before)
        if not self.used:
            raise UnsupportedModel(_no_interface(decoder))

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, Any]:
        """Has the signature of transformers' attention functions."""
        self.used = True
        old = key.shape[2] - query.shape[2]
        if old and self.calls:
            visible = self._visible(module, query, key.shape[2])
            if visible is not None:
                mask = _joined(mask, visible, query, old)
        if self.exact and all(v is None for k, v in options.items() if k in ("softcap", "s_aux")):
            return _exact(query, key, value, mask, options.get("scaling")), None
        return self._own(module)(module, query, key, value, mask, **options)

    def _visible(self, module: Any, query: torch.Tensor, tokens: int) -> torch.Tensor | None:
        """Returns [1, 1 or H, 1, tokens] bool, or None if the layer stores everything."""
        number = getattr(module, "kv_shared_layer_index", None)
        number = module.layer_idx if number is None else number
        stored = self.run.stored[self.calls - 1].get(number, Stored(None, 0))
        if stored.kept is None:
            return None
        kept = stored.kept if stored.kept.dim() == 3 else stored.kept[:, None]
        visible = torch.zeros(1, kept.shape[1], tokens, dtype=torch.bool, device=query.device)
        visible.scatter_(2, kept.to(query.device), True)
        visible[..., stored.later :] = True
        if kept.shape[1] > 1:
            visible = visible.repeat_interleave(query.shape[1] // kept.shape[1], 1)
        return visible[:, :, None]

    def _own(self, module: Any) -> Any:
        if self.own == "eager":
            return sys.modules[type(module).__module__].eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS[self.own]


def _decoder(model: Any) -> Any:
    """Returns the language model, which may lie several `get_decoder()` deep."""
    while callable(find := getattr(model, "get_decoder", None)) and find() is not model:
        model = find()
    return model


def _no_interface(decoder: Any) -> str:
    return (
        f"{type(decoder).__name__} does not take its attention from transformers' "
        "AttentionInterface, so the check cannot hide tokens from it"
    )


def _joined(
    mask: torch.Tensor | None, visible: torch.Tensor, query: torch.Tensor, old: int
) -> torch.Tensor:
    """Joins a mask (None: causal) with what is visible."""
    if mask is None:
        mask = _causal(query, old)
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)


def _causal(query: torch.Tensor, old: int) -> torch.Tensor:
    """Returns [1, 1, S, old + S] bool, the mask of new tokens after `old` others."""
    new = query.shape[2]
    mask = torch.ones(new, old + new, dtype=torch.bool, device=query.device).tril(old)
    return mask[None, None]


def _exact(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """Returns [B, S, H, D]."""
    new, old = query.shape[2], key.shape[2] - query.shape[2]
    groups = query.shape[1] // key.shape[1]
    wide = torch.float32 if query.dtype != torch.float64 else torch.float64
    keys = key.to(wide).repeat_interleave(groups, 1)
    values = value.to(wide).repeat_interleave(groups, 1)
    if mask is None:
        mask = _causal(query, old)
    out = []
    for start in range(0, new, ROWS):
        rows = slice(start, start + ROWS)
        logits = query[:, :, rows].to(wide) @ keys.mT * (scale or query.shape[3] ** -0.5)
        seen = mask[:, :, rows]
        if seen.dtype == torch.bool:
            logits = logits.masked_fill(~seen, torch.finfo(wide).min)
        else:
            logits = logits + seen.to(wide)
        out.append((logits.softmax(-1) @ values).to(query.dtype))
    return torch.cat(out, 2).transpose(1, 2).contiguous()
