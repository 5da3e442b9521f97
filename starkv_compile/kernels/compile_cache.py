"""Keeps torch's caches of compiled graphs from serving another version's kernels.

Inductor's cache key names the ops of a graph, not the Python they are made of: after an upgrade of
this package it would go on running the compiled code of the version before.
"""

from __future__ import annotations

import functools
import hashlib
from contextlib import AbstractContextManager
from pathlib import Path

from torch.compiler import config


@functools.cache
def source_fingerprint() -> str:
    """Changes with any source file of the kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def keyed_by_source() -> AbstractContextManager[None]:
    """While entered, compiled graphs are cached under the kernels' source as well.

    For whoever compiles a graph with `torch.ops.starkv` in it; the backend does so itself.
    """
    tag = f"{config.cache_key_tag}starkv-{source_fingerprint()}"
    return config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]
