"""What the model answers from the full cache, and from what each budget leaves of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from starkv_compile import StarKVCache, StarKVConfig, compile, undo
from starkv_compile.hf import with_cache

from .prompt import InspectedPrompt


def reply_at(prompt: InspectedPrompt, config: StarKVConfig, share: float, tokens: int) -> str:
    """The greedy reply of at most so many tokens, the cache compressed to `share`; 1: full.

    Its first token comes from the full cache whatever the share, as with any prompt.
    """
    compile(prompt.model, replace(config, budget=share, inner="eager"))
    try:
        output = prompt.model.generate(
            **prompt.inputs,
            **with_cache(StarKVCache(prompt.model.config)),
            max_new_tokens=tokens,
            do_sample=False,
        )
    finally:
        undo(prompt.model)
    reply = output[0, prompt.inputs["input_ids"].shape[1] :]
    return prompt.tokenizer.decode(reply, skip_special_tokens=True)


def replies(
    prompt: InspectedPrompt, config: StarKVConfig, shares: Sequence[float], tokens: int
) -> tuple[str, ...]:
    """The full cache's reply, then that at each share; () where no tokens are asked for."""
    if tokens == 0:
        return ()
    return tuple(reply_at(prompt, config, share, tokens) for share in (1.0, *shares))
