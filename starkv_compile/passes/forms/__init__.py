"""The forms of attention in graphs, one file each. A form is a module with two functions of a node:

    read(node)      returns the `Attention` that `node` computes; None if it is not of this form
    why_not(node)   returns why a node that looks like this form is refused; else None

Both only read the graph.
"""

from __future__ import annotations

from typing import Protocol

from torch.fx import Node

from ..sites import Attention
from . import efficient, flash, flex, kernels, sdpa, spelled_out
from .operands import NO_BIAS, NO_VALUES, NOT_4D


class Form(Protocol):
    """A module of this package."""

    def read(self, node: Node) -> Attention | None: ...

    def why_not(self, node: Node) -> str | None: ...


FORMS: tuple[Form, ...] = (sdpa, kernels, spelled_out, flex, flash, efficient)


def read(node: Node) -> Attention | None:
    """Returns `node` as an attention of the first form that reads it, or None."""
    return next((found for form in FORMS if (found := form.read(node)) is not None), None)


def why_not(node: Node) -> str | None:
    """Returns why an attention that no form reads is refused; None if it is no attention."""
    return next((reason for form in FORMS if (reason := form.why_not(node)) is not None), None)


__all__ = ["FORMS", "NOT_4D", "NO_BIAS", "NO_VALUES", "Form", "read", "why_not"]
