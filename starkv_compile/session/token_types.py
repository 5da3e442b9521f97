"""The kind of each token, which a processor gives with a turn and a model reads by place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from ..errors import UnsupportedModel

Types = dict[str, torch.Tensor]
"""[1, L] integers of all tokens so far, by the name of the model's argument. Text has 0."""

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")
"""The arguments that `generate` takes for the whole stream, as it takes the token ids."""

UNUSED = ("attention_mask", "labels")
"""What a session does not pass on: every token counts, and `generate` computes no loss."""

_KNOWN = ("input_ids", *TOKEN_TYPES, *UNUSED)

_WHOLE_PROMPT = ("paligemma",)
"""Families whose prompt attends to itself in both directions, from its first to its last token."""


def check_outputs(model: Any, new: Mapping[str, Any], before: int) -> None:
    """Raises `UnsupportedModel` unless a session can continue with a processor's output.

    Args:
        model: the Hugging Face model.
        new: what the processor gave for a turn.
        before: how many tokens came before it.
    """
    family = model.config.model_type
    if before and family in _WHOLE_PROMPT:
        raise UnsupportedModel(
            f"a model of family {family!r} reads a prompt in both directions, so what "
            "is cached of a turn would change with the next one; begin a new session for each "
            "prompt"
        )
    for name in TOKEN_TYPES:
        given = new.get(name)
        if before and given is not None and given.any() and _reads_a_part(model, name):
            raise UnsupportedModel(
                f"generate of transformers {_version()} passes only the last part of {name} to a "
                f"model of family {family!r}, which reads it from its start, so the images of a "
                "later turn would be misread; install transformers 5.23 or later"
            )
    shape = new["input_ids"].shape
    for name, value in new.items():
        if name in _KNOWN or name.startswith("pixel_"):  # of an image: of this size by chance
            continue
        if getattr(value, "shape", None) == shape:
            raise UnsupportedModel(
                f"the processor gives {name} of shape {list(shape)}, a number for each token of "
                "the turn, and a session does not know how to join it with that of earlier turns; "
                "pass the whole conversation to generate at each step, without a session"
            )


def _reads_a_part(model: Any, name: str) -> bool:
    """Whether the model makes its masks from types, and `generate` cuts them to the new tokens."""
    make = getattr(model, "create_masks_for_generate", None)
    if make is None or name not in inspect.signature(make).parameters:
        return False
    two = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    read = model.prepare_inputs_for_generation(
        two,
        next_sequence_length=1,
        attention_mask=torch.ones_like(two),
        use_cache=True,
        is_first_iteration=True,
        **{name: two},
    )
    return read[name] is not None and read[name].shape[1] < 2


def _version() -> str:
    import transformers

    return transformers.__version__


def joined(old: Types, new: Mapping[str, Any], before: int) -> Types:
    """The types of `before` tokens and of a new turn. A turn without some is text.

    Args:
        old: types of the tokens so far.
        new: what the processor gave for the turn.
        before: how many tokens came before it.
    """
    length = before + new["input_ids"].shape[1]
    whole = resized(old, before, length)
    for name in TOKEN_TYPES:
        given = new.get(name)
        if given is not None:
            earlier = old.get(name, given.new_zeros(1, before))
            whole[name] = torch.cat([earlier, given], dim=1)
    return whole


def resized(types: Types, start: int, length: int) -> Types:
    """The types of the first `start` tokens, and 0 (text) up to `length`."""
    return {name: F.pad(one[:, :start], (0, length - start)) for name, one in types.items()}
