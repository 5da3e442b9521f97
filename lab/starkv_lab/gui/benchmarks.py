"""Lists the benchmarks and finds one by its name."""

from __future__ import annotations

import hashlib
from pathlib import Path

from starkv_compile import OptionError, StarKVError

from .agentnet_bench import AGENTNET_BENCH
from .android_control import ANDROID_CONTROL
from .samples import Dataset
from .screenspot_pro import SCREENSPOT_PRO
from .screenspot_v2 import SCREENSPOT_V2

DATASETS = {d.name: d for d in (SCREENSPOT_V2, SCREENSPOT_PRO, ANDROID_CONTROL, AGENTNET_BENCH)}


def dataset_of(name: str) -> Dataset:
    """Returns the benchmark called `name`. Raises `OptionError` if there is none."""
    if name not in DATASETS:
        raise OptionError(f"data set {name!r}: expected one of {', '.join(DATASETS)}")
    return DATASETS[name]


def fingerprint(dataset: Dataset, folder: Path) -> str:
    """Returns an id of this copy of a data set, from the names and sizes of its files.

    Raises:
        StarKVError: the folder has none of the files.
    """
    paths = sorted({path for pattern in dataset.files for path in folder.glob(pattern)})
    if not paths:
        raise StarKVError(
            f"{folder}: no files of {dataset.title} ({', '.join(dataset.files)}); download "
            f"{dataset.source}"
        )
    known = [f"{path.relative_to(folder)} {path.stat().st_size}" for path in paths]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:12]
