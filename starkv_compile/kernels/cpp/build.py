"""Compile and load one C++ source."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

VECTORS = Path(__file__).with_name("vectors.h")


@functools.cache
def library(source: Path, *flags: str) -> Any:
    """The compiled `source`, from Inductor's cache where it is there. Further flags are for tests.

    Inductor itself asks for neither flag: it writes its vectors out, and its results do not depend
    on whether the machine fuses a product with a sum.
    """
    from torch._inductor.codecache import CppCodeCache

    flags = ("-ffp-contract=fast", "-ftree-loop-vectorize", *flags)
    code = source.read_text().replace(f'#include "{VECTORS.name}"', VECTORS.read_text())
    return CppCodeCache.load(code, extra_flags=flags)


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Of its first element; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
