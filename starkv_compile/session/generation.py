"""Which options of `generate` a session can take, whoever asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..errors import CacheError, OptionError
from ..hf.cache_argument import NAMES as CACHE_NAMES
from .token_types import TOKEN_TYPES


class Limit(NamedTuple):
    """What a session takes for an option. use: the value that the error names. why: the reason."""

    taken: tuple[Any, ...]
    use: Any
    why: str


_ONE = "a session gives one reply; for several, call step on several forks"
_DRAFTS = "drafted tokens need a cache that can be rolled back, and a session's cannot"
_DECODING = (
    "this way of decoding brings a cache of its own, so the session would not have the reply"
)
_CACHE = "a session is its cache, and passes it to generate"

LIMITS = {
    "num_beams": Limit((None, 1), 1, _ONE),
    "num_return_sequences": Limit((None, 1), 1, _ONE),
    "num_beam_groups": Limit((None, 1), 1, _ONE),
    "constraints": Limit((None,), None, _ONE),
    "force_words_ids": Limit((None,), None, _ONE),
    "return_dict_in_generate": Limit(
        (None, False),
        False,
        "step returns the reply as text. The reply's tokens are the last of session.input_ids, and "
        "the cache is session.cache",
    ),
    "use_cache": Limit((None, True), True, _CACHE),
    # "hybrid" is what older checkpoints ask for, and transformers ignores it.
    "cache_implementation": Limit((None, "hybrid"), None, _CACHE),
    "prompt_lookup_num_tokens": Limit((None,), None, _DRAFTS),
    "assistant_model": Limit((None,), None, _DRAFTS),
    "assistant_early_exit": Limit((None,), None, _DRAFTS),
    "speculation_type": Limit((None,), None, _DRAFTS),
    "use_mtp": Limit((None, False), None, _DRAFTS),
    "penalty_alpha": Limit((None, 0), None, _DECODING),
    "dola_layers": Limit((None,), None, _DECODING),
    "custom_generate": Limit((None,), None, _DECODING),
    "token_healing": Limit(
        (None, False), False, "it changes the end of the prompt, which the session has cached"
    ),
}
"""Options that would leave the session with other keys than those of the reply."""

OWN = (
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    *TOKEN_TYPES,
    "pixel_values",
    "image_grid_thw",
    *CACHE_NAMES,
)
"""Arguments that the session makes itself."""


def check_options(model: Any, options: Mapping[str, Any]) -> None:
    """Raises `OptionError` for an option with which the session would not hold the reply.

    Args:
        model: the Hugging Face model, whose `generation_config` counts too.
        options: the arguments for `generate`.
    """
    for name in OWN:
        if name in options:
            raise OptionError(f"{name}: the session makes this argument itself; leave it out")
    for name, limit in LIMITS.items():
        value, source = _asked(model, options, name)
        if not any(value is taken or value == taken for taken in limit.taken):
            raise OptionError(
                f"{name}={value!r:.60}{source}: {limit.why}. Pass {name}={limit.use} to step"
            )


def _asked(model: Any, options: Mapping[str, Any], name: str) -> tuple[Any, str]:
    """The value of an option, and where it comes from: as in `generate`, arguments come first."""
    if name in options:
        return options[name], ""
    value = getattr(options.get("generation_config"), name, None)
    if value is not None:
        return value, " in generation_config"
    own = getattr(model, "generation_config", None)
    return getattr(own, name, None), " in the model's generation_config"


def end_tokens(model: Any, options: Mapping[str, Any]) -> list[int]:
    """The tokens that end a reply."""
    ends, _ = _asked(model, options, "eos_token_id")
    return [] if ends is None else torch.as_tensor(ends).flatten().tolist()


def check_output(output: Any, prompt: torch.Tensor, seen: int) -> None:
    """Raises `CacheError` unless the cache has seen `prompt` [1, L] and the one reply to it.

    Args:
        output: what `generate` returned.
        prompt: the token ids that it was given.
        seen: tokens that the cache has seen since.
    """
    length = prompt.shape[1]
    if not isinstance(output, torch.Tensor) or output.shape[:1] != (1,):
        what = f"a {type(output).__name__}"
    elif output.shape[1] <= length or not torch.equal(output[:, :length], prompt):
        what = f"tokens of shape {list(output.shape)}, which do not continue the prompt's {length}"
    elif output.shape[1] != seen + 1:
        what = f"{output.shape[1]} tokens, of which the session's cache has seen {seen}"
    else:
        return
    raise CacheError(
        f"generate returned {what}; expected the {length} tokens of the prompt and one reply, all "
        "but the last in the session's cache. Use a model whose generate is that of transformers, "
        "or begin without a session"
    )
