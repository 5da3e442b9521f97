"""Runs the same session several times: with and without starkv, with the same replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from starkv_compile import AgentSession
from starkv_compile.cache import StarKVLayer

Content = list[dict[str, Any]]


@dataclass(frozen=True)
class Stored:
    """Says which tokens a layer has after a call of the model.

    kept: [1, C] or [1, G, C] int64, places of the tokens that the last compaction kept; None if
    there was none. later: place of the first token after that compaction. All from there on are
    stored.
    """

    kept: torch.Tensor | None
    later: int

    @property
    def dropped(self) -> int:
        """How many tokens each head has dropped."""
        return 0 if self.kept is None else self.later - self.kept.shape[-1]

    @classmethod
    def of(cls, layer: StarKVLayer) -> Stored:
        if layer.kept is None:
            return cls(None, 0)
        return cls(layer.kept.clone(), layer.seen - (layer.stored - layer.kept.shape[-1]))


@dataclass
class Run:
    """Holds what the calls of the model in one session gave.

    logits: [V] float32 on the CPU for each call, those of the last token. stored: for each call,
    the compressed layers' contents after it, by the layer's number. prompts: which calls read a
    prompt. replies: the token ids of each reply.
    """

    logits: list[torch.Tensor] = field(default_factory=list)
    stored: list[dict[int, Stored]] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    replies: list[list[int]] = field(default_factory=list)


def run_session(
    model: Any,
    processor: Any,
    turns: Sequence[Content],
    tokens: int,
    forced: Sequence[Sequence[int]] | None = None,
    after_call: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Runs `turns` in a new `AgentSession`, with greedy replies of at most `tokens` tokens.

    Args:
        forced: token ids of each reply, which the model then does not choose itself.
        after_call: called after each call of the model.
    """
    run = Run()
    session = AgentSession(model, processor)

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        run.logits.append(output.logits[0, -1].float().cpu())
        layers = enumerate(session.cache.layers)
        run.stored.append({i: Stored.of(x) for i, x in layers if isinstance(x, StarKVLayer)})
        after_call(run)

    hook = model.register_forward_hook(note, with_kwargs=True)
    try:
        for number, content in enumerate(turns):
            run.prompts.append(len(run.logits))
            options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False}
            if forced is not None:
                force = _Forced(forced[number])
                options |= {
                    "max_new_tokens": len(forced[number]),
                    "logits_processor": LogitsProcessorList([force]),
                }
            session.step(content, **options)
            assert session.input_ids is not None
            run.replies.append(session.input_ids[0, session.prompt_length :].tolist())
    finally:
        hook.remove()
    return run


class _Forced(LogitsProcessor):
    """Lets `generate` choose the given tokens, one after the other."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._left = list(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self._left.pop(0)] = 0.0
        return chosen
