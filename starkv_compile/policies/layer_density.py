"""VL-Cache's budgets by layer, measured on a prompt before a model is compiled."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UnsupportedModel

SPARSE = 0.01
"""An attention weight below this part of its row's largest counts as zero."""


@torch.no_grad()
def measure_layer_budgets(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, ...]:
    """Measures VL-Cache's budgets by layer (Tu et al., arXiv 2410.23317) on a prompt.

    A layer's budget is its density: the share of attention weights that are at least 1 % of the
    largest weight in their row, over the queries after the last image.

    Args:
        model: a model that is not compiled. It computes full attention weights, so use a short
            prompt.
        inputs: arguments of the model for a prompt of one row, with images.

    Returns:
        The value for the option `layer_budgets`, a number from 0 to 1 for each layer with full
        attention, first to last.

    Raises:
        UnsupportedModel: the model returns no attention weights, or the prompt ends in an image.
    """
    decoder = model.get_decoder()
    config = model.config.get_text_config(decoder=True)
    form = config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        weights = model(**inputs, output_attentions=True, use_cache=False).attentions
    finally:
        decoder.set_attn_implementation(form)
    if not weights or weights[0] is None:
        raise UnsupportedModel(
            f"{type(model).__name__} gives no attention weights to measure; choose layer_budgets "
            "yourself"
        )
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(weights)
    whole = [w for w, kind in zip(weights, kinds, strict=True) if kind == "full_attention"]
    visual = inputs["input_ids"][0] == getattr(model.config, "image_token_id", -1)
    after = int(visual.nonzero().amax()) + 1 if bool(visual.any()) else 0
    if after == len(visual):
        raise UnsupportedModel(
            "the prompt ends in an image, so no query comes after it; add text after the image"
        )
    return tuple(density(layer[:, :, after:]) for layer in whole)


def density(weights: torch.Tensor) -> float:
    """Share of attention weights [B, H, rows, L] that are at least 1 % of their row's largest.

    Keys after the query do not count.
    """
    queries, length = weights.shape[2:]
    seen = torch.ones(queries, length, dtype=torch.bool, device=weights.device)
    seen = seen.tril(length - queries).expand_as(weights)
    dense = (weights >= SPARSE * weights.amax(-1, keepdim=True)) & seen
    return float(dense.sum() / seen.sum())
