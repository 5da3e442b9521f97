"""Chooses the part of a data set, and the device, of one process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from starkv_compile import OptionError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """Takes every `count`-th sample, beginning with sample `index`, counted from 0."""

    index: int = 0
    count: int = 1

    def of(self, items: Iterable[Item]) -> Iterator[Item]:
        return islice(items, self.index, None, self.count)


def shard_of(written: str | None, environ: Mapping[str, str] = os.environ) -> Shard:
    """Reads a part written as "i/n". None takes RANK and WORLD_SIZE from the environment.

    torchrun and accelerate set these two.

    Raises:
        OptionError: the text is no such part.
    """
    if written is None:
        written = f"{environ.get('RANK', '0')}/{environ.get('WORLD_SIZE', '1')}"
    matched = re.fullmatch(r"(\d+)/(\d+)", written)
    if not matched or int(matched[1]) >= int(matched[2]):
        raise OptionError(f"shard {written!r}: expected i/n, with i from 0 to n - 1, such as 0/4")
    return Shard(int(matched[1]), int(matched[2]))


def device_of(written: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """Returns `written`, or for None the GPU of LOCAL_RANK (default 0) or, without one, the CPU."""
    import torch

    if written is not None:
        return written
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{environ.get('LOCAL_RANK', '0')}"
