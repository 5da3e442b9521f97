"""How a kernel is launched, and what all of them share."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# Scores travel as powers of two: exp2 is one instruction. Logits stay within +-BIG, so that
# differences of them are never NaN.
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
BIG: tl.constexpr = tl.constexpr(3e38)


def launch(kernel: Any, grid: tuple[Any, ...], *args: Any, **constants: Any) -> None:
    """Run `kernel` on `grid` programs, in a form that Inductor and `torch.export` can trace."""
    if isinstance(kernel, triton.JITFunction):  # otherwise the interpreter runs it, untraced
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](*args, **constants)


def padded(size: int, least: int = 16) -> int:
    """The power of two that a block of `size` needs; `tl.dot` takes no fewer than 16."""
    return max(least, triton.next_power_of_2(size))
