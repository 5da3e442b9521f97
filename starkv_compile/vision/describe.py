"""Finds out what each token of a call is, from the arguments of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..kernels.reference.layout import layout_from_image_mask, layout_from_positions
from .image_shapes import deal_out, image_shapes

Described = tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]


class Seen(NamedTuple):
    """What a call says of each of its tokens.

    is_image: [B, S] bool, or None if neither token ids nor token types are given.
    positions: [3 or 4, B, S], M-RoPE position ids, or None.
    """

    is_image: torch.Tensor | None
    positions: torch.Tensor | None

    @classmethod
    def of(cls, config: Any, named: Mapping[str, Any]) -> Seen:
        """Reads the arguments of a model, which have their names as keys."""
        positions = named.get("position_ids")
        rope = isinstance(positions, torch.Tensor) and positions.dim() == 3 and len(positions) >= 3
        return cls(_image_tokens(config, named), positions if rope else None)

    @property
    def length(self) -> int:
        """S."""
        known = self.is_image if self.is_image is not None else self.positions
        return 0 if known is None else known.shape[-1]

    def followed_by(self, other: Seen) -> Seen:
        """The tokens of both, in a row. What one of them lacks, both lack."""
        return Seen(*(_joined(*parts) for parts in zip(self, other, strict=True)))


def _joined(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None or one.shape[:-1] != other.shape[:-1]:
        return None
    return torch.cat([one, other], dim=-1)


def tokens_of(named: Mapping[str, Any]) -> torch.Tensor | None:
    """The tokens of a call: ids [B, S], else embeddings [B, S, E].

    None: there are none, or they have no batch, as in a model of one's own.
    """
    ids = named.get("input_ids")
    tokens = named.get("inputs_embeds") if ids is None else ids
    return None if tokens is None or tokens.dim() < 2 else tokens


def image_token_ids(config: Any) -> list[int]:
    """The ids that stand for images and videos, under every name that a configuration has."""
    names = ("image_token_id", "image_token_index", "video_token_id")
    known = [getattr(config, name, None) for name in names]
    return [token for token in known if isinstance(token, int)]


def describe(seen: Seen, named: Mapping[str, Any]) -> Described | None:
    """Returns frame (from 0), row and column [B, S] of tokens, and where they come from.

    Args:
        seen: the tokens.
        named: the model's arguments, which may have the shapes of images.

    Returns:
        None if nothing says which tokens are visual.
    """
    is_image, positions = seen
    if is_image is not None:
        by_grid = deal_out(is_image, image_shapes(is_image, named))
        if by_grid is not None:
            return (*by_grid, "grid")
    if positions is not None:
        frame, row, column, _ = layout_from_positions(positions)
        # A frame of one token looks like text in its positions: trust these if both sources agree.
        if is_image is None or torch.equal(frame >= 0, is_image):
            return frame, row, column, "positions"
    if is_image is None:
        return None
    frame, row, column, _ = layout_from_image_mask(is_image)
    return frame, row, column, "square"


def _image_tokens(config: Any, named: Mapping[str, Any]) -> torch.Tensor | None:
    """[B, S] bool, or None where neither token ids nor token types are given."""
    tokens, types = tokens_of(named), named.get("mm_token_type_ids")
    if tokens is None:
        return None
    if named.get("input_ids") is None:
        return types > 0 if types is not None and types.shape[1] == tokens.shape[1] else None
    markers = torch.tensor(image_token_ids(config), device=tokens.device)
    return torch.isin(tokens, markers.to(tokens.dtype))
