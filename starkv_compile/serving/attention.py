"""An attention of vLLM that compacts prompts."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from .current import current_rule
from .metadata import Step
from .metrics import count_compactions
from .pages import Pages
from .plan import Row
from .refusals import check_layer
from .rule import Rule
from .scoring import Stored, choose

Tensor = torch.Tensor


@dataclass
class Compactor:
    """What one layer needs between steps.

    Attributes:
        rule: the engine's rule.
        saved: queries of windows that began in an earlier step, [tokens, H, D] by request.
        stored: what stayed at a prompt's last stop, by request; it goes on to the next one.
        pages: how the layer's cache is read; made at the first compaction.
        layer: the layer's number in the model.
    """

    rule: Rule
    saved: dict[str, Tensor] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)
    pages: Pages | None = None
    layer: int = 0

    @torch.no_grad()
    def run(self, attention: Any, layer: Any, query: Tensor, cache: Tensor, step: Step) -> None:
        """Saves queries and compacts the prompts of a step."""
        for by_request in (self.saved, self.stored):
            for request in [name for name in by_request if not step.is_alive(name)]:
                del by_request[request]
        for saving in step.plan.savings:
            new = query[saving.start : saving.stop].clone()
            before = () if saving.is_first else (self.saved[saving.request],)
            self.saved[saving.request] = torch.cat([*before, new])
        start, rows = time.perf_counter(), step.plan.compactions
        for row in rows:
            self._compact(attention, layer, query, cache, step, row)
            step.plan.done += 1
        if rows:
            count_compactions(len(rows), time.perf_counter() - start)
        for request in step.plan.ended:
            self.stored.pop(request, None)

    def _compact(
        self, attention: Any, layer: Any, query: Tensor, cache: Tensor, step: Step, row: Row
    ) -> None:
        block = step.block_size
        if self.pages is None:
            self.pages = Pages(attention, layer, cache, block)
            self.layer = _number(layer.layer_name)
        blocks = step.blocks[row.number]
        key, value = self.pages.read(cache, blocks[row.gone // block :], row.stop - row.gone)
        kept, stored = choose(
            self.rule,
            self._window(query, row).transpose(0, 1),
            key,
            value,
            float(attention.scale),
            row.stop - row.left,
            step.layout(row, key.device),
            self.layer,
            self._before(row),
        )
        if row.stop < row.prompt:
            self.stored[row.request] = stored
        place = torch.arange(row.left, row.stop, device=key.device)
        slots = blocks[place // block].long() * block + place % block
        # By the backend's own writer, so that any layout of its cache is right.
        attention.do_kv_cache_update(layer, _rows(key, kept), _rows(value, kept), cache, slots)

    def _before(self, row: Row) -> Stored | None:
        """What stayed at the last stop. A preempted request may have left some, and begins anew."""
        before = self.stored.pop(row.request, None)
        if not row.gone:
            return None
        assert before is not None, f"nothing is known of what {row} has stored"
        return before

    def _window(self, query: Tensor, row: Row) -> Tensor:
        """[W, H, D]: the last queries before the stop."""
        wanted = row.window(self.rule.config.scoring_window)
        saved = self.saved.pop(row.request, None)
        recent = query[max(row.first, row.end - wanted) : row.end]
        if len(recent) < wanted:
            assert saved is not None, f"no queries were saved of {row}"
            recent = torch.cat([saved, recent])[-wanted:]
        assert len(recent) == wanted, f"{len(recent)} of {wanted} queries were saved of {row}"
        return recent


def _number(name: str) -> int:
    """3, of "language_model.model.layers.3.self_attn.attn"."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else 0


def _rows(tokens: Tensor, kept: Tensor) -> Tensor:
    """[kept, G, D] of tokens [G, L, D], as backends write them."""
    if kept.dim() == 1:
        return tokens[:, kept].transpose(0, 1).contiguous()
    index = kept[..., None].expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, index).transpose(0, 1).contiguous()


def compacting_attention(base: type) -> type:
    """A subclass of a backend's attention."""

    class CompactingAttention(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            rule = current_rule()
            if rule is not None:
                check_layer(self)
            self.compactor = None if rule is None else Compactor(rule)

        def forward(
            self,
            layer: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            kv_cache: Tensor,
            attn_metadata: Any,
            output: Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> Tensor:
            found = super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
            step: Step | None = getattr(attn_metadata, "starkv", None)
            if step is None or self.compactor is None:
                return found
            self.compactor.run(self, layer, query, kv_cache, step)
            if step.again is not None:
                # Outputs that were computed before must see what they saw then.
                places = step.again_places
                part = torch.empty_like(output[places])
                tokens = (t[places] for t in (query, key, value))
                super().forward(layer, *tokens, kv_cache, step.again, part, *args, **kwargs)
                output[places] = part
            return found

    CompactingAttention.__name__ = f"Compacting{base.__name__}"
    CompactingAttention.__qualname__ = CompactingAttention.__name__
    return CompactingAttention
