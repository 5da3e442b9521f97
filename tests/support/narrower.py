"""C++ kernels compiled for narrower vectors than this machine's."""

import importlib
import platform

from starkv_compile.kernels.cpp.build import library
from tests.support.crossing import slow

X86 = platform.machine() == "x86_64"
NARROWER = ["", *(slow(flag, ci=True) for flag in ("-mno-avx512f", "-mno-avx") if X86)]
"""Compiler flags: for 16, 8 and 4 numbers a vector, as far as this machine has them. Each costs a
compilation."""


def narrower(monkeypatch, kernel, flag):
    """Lets the module `kernel` of `kernels.cpp` run code compiled with `flag`."""
    flags = (flag,) if flag else ()
    module = importlib.import_module(f"starkv_compile.kernels.cpp.{kernel}")
    monkeypatch.setattr(module, "library", lambda source: library(source, *flags))
