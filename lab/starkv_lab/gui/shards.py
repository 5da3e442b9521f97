"""Which part of a data set a process answers."""

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
    """Part `index` of `count`, counted from 0: every `count`-th sample."""

    index: int = 0
    count: int = 1

    def of(self, items: Iterable[Item]) -> Iterator[Item]:
        return islice(items, self.index, None, self.count)


def shard_of(written: str | None, environ: Mapping[str, str] = os.environ) -> Shard:
    """The part written as "i/n"; None: RANK of WORLD_SIZE, as torchrun and accelerate set them.

    Raises:
        OptionError: it is no such part.
    """
    if written is None:
        written = f"{environ.get('RANK', '0')}/{environ.get('WORLD_SIZE', '1')}"
    matched = re.fullmatch(r"(\d+)/(\d+)", written)
    if not matched or int(matched[1]) >= int(matched[2]):
        raise OptionError(f"shard {written!r}: i/n, with i from 0 to n - 1, such as 0/4")
    return Shard(int(matched[1]), int(matched[2]))


def device_of(written: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """The device named; None: the GPU of LOCAL_RANK, or the first; the CPU where there is none."""
    import torch

    if written is not None:
        return written
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{environ.get('LOCAL_RANK', '0')}"
