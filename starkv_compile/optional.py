"""Imports of packages that only some features need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from .errors import MissingPackage

TENSORRT = {"2.11": "10.15", "2.13": "11.0", "2.14": "11.1"}
"""For each release of torch, the TensorRT release that its torch-tensorrt uses. Each pair has an
extra of this package. A release of torch-tensorrt needs exactly its own release of torch."""

TORCH_TENSORRT_SETTINGS: dict[str, Any] = {
    # Its default takes any mask for a causal one, which loses the masks of padded rows.
    "attn_bias_is_causal": False,
    # Ten bits of mantissa would keep other tokens.
    "disable_tf32": True,
}
"""Settings that every call of torch-tensorrt needs, both as a backend and for exported programs."""


def extra(name: str) -> str:
    """The command that installs an extra of this package, which is not on PyPI."""
    return f"in a clone of starkv-compile: pip install '.[{name}]'"


def needs(name: str) -> Any:
    """Returns the module `name`.

    Raises:
        MissingPackage: it is not installed. The message gives the command that installs it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackage(f"{name} is not installed ({error}): {extra('export')}") from error


def needs_tensorrt(name: str) -> Any:
    """Returns the module `name` of TensorRT or torch-tensorrt.

    Raises:
        MissingPackage: it cannot be imported. The message gives the command that installs it.
    """
    try:
        return import_module(name)
    except Exception as error:  # its libraries and a driver can raise anything
        why = str(error).strip().split("\n")[0]
        raise MissingPackage(
            f"{name} cannot be imported ({why}); {_how_to_get_tensorrt()}"
        ) from error


def _how_to_get_tensorrt() -> str:
    release = ".".join(torch.__version__.split(".")[:2])
    if release in TENSORRT:
        return f"torch {release} needs TensorRT {TENSORRT[release]}: {_pip_line(release)}"
    newest = max(TENSORRT)
    return (
        f"torch-tensorrt has no release for torch {release}; it has releases for torch "
        f"{', '.join(TENSORRT)}: {_pip_line(newest)}"
    )


def _pip_line(release: str) -> str:
    return extra(f"tensorrt-{release.replace('.', '-')}")


__all__ = ["needs", "needs_tensorrt"]
