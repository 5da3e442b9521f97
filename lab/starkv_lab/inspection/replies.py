"""Asks the model for a reply from the full cache and from the cache at each budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from starkv_compile import StarKVCache, StarKVConfig, compiled
from starkv_compile.hf import with_cache

from .prompt import InspectedPrompt


def reply_at(prompt: InspectedPrompt, config: StarKVConfig, share: float, tokens: int) -> str:
    """Returns the greedy reply from a cache that is compressed to `share`; 1 is the full cache.

    The reply has at most `tokens` tokens. Its first token comes from the full cache at any share,
    as with any prompt.
    """
    with compiled(prompt.model, replace(config, budget=share, inner="eager")) as model:
        output = model.generate(
            **prompt.inputs,
            **with_cache(StarKVCache(model.config)),
            max_new_tokens=tokens,
            do_sample=False,
        )
    reply = output[0, prompt.inputs["input_ids"].shape[1] :]
    return prompt.tokenizer.decode(reply, skip_special_tokens=True)


def replies(
    prompt: InspectedPrompt, config: StarKVConfig, shares: Sequence[float], tokens: int
) -> tuple[str, ...]:
    """Returns the reply from the full cache, then at each share; () where `tokens` is 0."""
    if tokens == 0:
        return ()
    return tuple(reply_at(prompt, config, share, tokens) for share in (1.0, *shares))
