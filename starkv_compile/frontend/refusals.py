"""Why a prompt stays uncompressed: one function for each reason, called before the model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from ..cache.cache import StarKVCache, is_stock
from ..cache.chunk import DRAFTED_PROMPT, drafted_tokens
from ..cache.layer import StarKVLayer
from ..hf.attention import attention_implementation, takes_any_mask
from ..hf.packed_rows import is_packed


@dataclass(frozen=True)
class PromptCall:
    """A call of an attached model with several new tokens.

    named: the model's arguments, with their names as keys. cache: the cache among them, or None.
    uneven: whether the configuration makes layers store different numbers of tokens. declared:
    whether the model says that it takes a `Cache`, as in `hf.cache_argument.CacheArgument`.
    argument: the model's name for it. takes_mask: whether it has an argument attention_mask.
    """

    model: Any
    named: Mapping[str, Any]
    cache: Any
    uneven: bool
    declared: bool = True
    argument: str = "past_key_values"
    takes_mask: bool = True

    @property
    def own_cache(self) -> str:
        """How the caller passes a cache that starkv shortens."""
        configured = isinstance(getattr(self.model, "config", None), PreTrainedConfig)
        config = "model.config" if configured else "PreTrainedConfig(num_hidden_layers=...)"
        return f"{self.argument}=starkv_compile.StarKVCache({config})"


Refusal = Callable[[PromptCall], str | None]
"""Returns a sentence that says why the prompt stays uncompressed, with the way out; or None."""


def in_training(call: PromptCall) -> str | None:
    if not call.model.training:
        return None
    return "the model is in training mode; call model.eval() first"


def other_cache(call: PromptCall) -> str | None:
    cache = call.cache
    if cache is None or isinstance(cache, StarKVCache) or is_stock(cache):
        return None
    kind = type(cache).__name__ + (" with offloading" if type(cache) is DynamicCache else "")
    if kind == "PagedAttentionCache":
        return (
            "the cache is a PagedAttentionCache of continuous batching, which starkv cannot "
            "shorten; call model.generate in place of generate_batch"
        )
    if isinstance(cache, EncoderDecoderCache):
        return (
            f"the cache is an {kind}, and starkv does not shorten those of encoder-decoder models"
        )
    if not isinstance(cache, Cache):
        return f"the cache is a {kind} and no Cache of transformers, so nobody counts its tokens"
    return (
        f"the cache is a {kind}, which starkv cannot shorten; use the default cache, or pass "
        f"{call.own_cache}"
    )


def cross_attention(call: PromptCall) -> str | None:
    if call.named.get("encoder_hidden_states") is None:
        return None
    return (
        "the model attends to an encoder as well (encoder_hidden_states), and starkv does not "
        "shorten the caches of such models"
    )


def without_cache(call: PromptCall) -> str | None:
    default = getattr(getattr(call.model, "config", None), "use_cache", True)
    if call.named.get("use_cache", default) is not False:
        return None
    return "use_cache=False: there is no cache to compress; leave use_cache out, or set it to True"


def packed_rows(call: PromptCall) -> str | None:
    if not is_packed(call.named.get("position_ids"), call.named.get("attention_mask")):
        return None
    return (
        "several sequences are packed into one row, because its position_ids start again; pass "
        "them as rows of a batch, padded on the left"
    )


def uneven_padding(call: PromptCall) -> str | None:
    mask = call.named.get("attention_mask")
    if not call.uneven or mask is None:
        return None
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and bool(mask.all()):
        return None
    return (
        "the prompts are padded, and layers would store different numbers of tokens and of "
        "padding, so no single mask could hide the padding in all layers; call the model once "
        "for each prompt, or use a policy with one budget for every layer"
    )


def uneven_attention(call: PromptCall) -> str | None:
    if not call.uneven:
        return None
    if call.takes_mask and takes_any_mask(call.model):
        return None
    form = attention_implementation(call.model)
    if not call.takes_mask or form in ("own", "sdpa", "eager"):
        return (
            "layers would store different numbers of tokens, and the model takes no attention_mask "
            "that fits them all; use a policy with one budget for every layer"
        )
    return (
        f"layers would store different numbers of tokens, and {form} takes no mask for that; load "
        'the model with attn_implementation="sdpa"'
    )


def unknown_windows(call: PromptCall) -> str | None:
    if isinstance(call.cache, StarKVCache):
        return None
    if _text_config(call.model) is not None:
        return None
    return (
        f"{type(call.model).__name__} has no Hugging Face config with num_hidden_layers, so it is "
        "unknown which of its layers attend by a sliding window; if none does, pass "
        f"{call.argument}=starkv_compile.StarKVCache(PreTrainedConfig(num_hidden_layers=...))"
    )


def undeclared_cache(call: PromptCall) -> str | None:
    if call.declared or call.cache is not None:
        return None
    return (
        f"{type(call.model).__name__}.forward does not say that its cache is a Cache of "
        "transformers (in older code it is a tuple), so it is not given one; if it takes one, "
        f"pass {call.own_cache}"
    )


def other_layers(call: PromptCall) -> str | None:
    """Layers that store every token in another way share the mask of those that drop some."""
    if isinstance(call.cache, StarKVCache):
        layers = call.cache.layers
    elif _text_config(call.model) is not None:
        layers = StarKVCache(call.model.config).layers
    else:
        return None
    kinds = {type(layer).__name__ for layer in layers if _stores_all_otherwise(layer)}
    if not kinds or not any(isinstance(layer, StarKVLayer) for layer in layers):
        return None
    return (
        f"some layers store their tokens in a {' or '.join(sorted(kinds))}, which starkv cannot "
        "shorten, and a model has one mask for all its layers; compress a model whose layers all "
        "store keys and values in the same way"
    )


def _text_config(model: Any) -> PreTrainedConfig | None:
    """The library's configuration of the language model; None unless it knows the layers."""
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if isinstance(config, PreTrainedConfig) else None
    return text if hasattr(text, "num_hidden_layers") else None


def _stores_all_otherwise(layer: Any) -> bool:
    grows = isinstance(layer, DynamicLayer) and not isinstance(layer, StarKVLayer)
    return grows and not getattr(layer, "is_sliding", False)


def foreign_tokens(call: PromptCall) -> str | None:
    if not is_stock(call.cache) or call.cache.get_seq_length() == 0:
        return None
    return (
        f"the {type(call.cache).__name__} passed in already holds tokens stored without starkv; "
        f"begin the session with {call.own_cache}"
    )


def drafted_prompt(call: PromptCall) -> str | None:
    if not drafted_tokens(call.named):
        return None
    empty = call.cache is None or call.cache.get_seq_length() == 0
    return DRAFTED_PROMPT if empty else None


REFUSALS: tuple[Refusal, ...] = (
    in_training,
    other_cache,  # first of those that look at the cache; some bring use_cache=False with them
    cross_attention,
    without_cache,
    packed_rows,
    uneven_padding,
    uneven_attention,
    undeclared_cache,
    unknown_windows,
    foreign_tokens,
    other_layers,
    drafted_prompt,  # last: its tokens are stored in a cache that compresses later ones
)
"""The first function in this order that has a reason wins."""


def first_refusal(call: PromptCall) -> tuple[Refusal, str] | None:
    """Returns the refusal that wins, and its sentence; None if the prompt can be compressed."""
    for refusal in REFUSALS:
        reason = refusal(call)
        if reason is not None:
            return refusal, reason
    return None
