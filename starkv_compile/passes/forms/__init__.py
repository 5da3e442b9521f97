"""The forms attention has in graphs, a file each. A form is a module of two readers of one node:

    read(node)      the `Attention` that `node` computes, or None if it is not of this form
    why_not(node)   why `node`, which looks like this form and is not read, is left; or None

They read only; nothing is inserted.
"""

from __future__ import annotations

from typing import Protocol

from torch.fx import Node

from ..sites import Attention
from . import flash, flex, kernels, sdpa, spelled_out
from .operands import NO_BIAS, NO_VALUES


class Form(Protocol):
    """A module of this package."""

    def read(self, node: Node) -> Attention | None: ...

    def why_not(self, node: Node) -> str | None: ...


FORMS: tuple[Form, ...] = (sdpa, kernels, spelled_out, flex, flash)


def read(node: Node) -> Attention | None:
    """`node` as an attention of the first form that reads it."""
    return next((found for form in FORMS if (found := form.read(node)) is not None), None)


def why_not(node: Node) -> str | None:
    """What an attention that no form reads has, which scores would not account for."""
    return next((reason for form in FORMS if (reason := form.why_not(node)) is not None), None)


__all__ = ["FORMS", "NO_BIAS", "NO_VALUES", "Form", "read", "why_not"]
