"""The machine and the versions that a measured number depends on, and the memory of a run."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from . import __version__

HERE = Path(__file__).resolve()


def environment(device: str = "cpu") -> dict[str, str | int]:
    """Returns versions, processor and GPU. The GPU is "none" where `device` is "cpu".

    "commit" is the commit of the checkout that this package runs from. An installed package has
    none, so its version stands there.
    """
    gpu = torch.cuda.get_device_name() if device == "cuda" else "none"
    return {
        "commit": commit_of(HERE) or __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": gpu,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def commit_of(file: Path) -> str:
    """Returns the commit of the checkout that tracks `file`.

    Returns "" where git is missing or no checkout tracks the file. A package that is installed
    inside another project's checkout does not count as that project's commit.
    """
    tracked = _git(file.parent, "ls-files", "--error-unmatch", file.name)
    return _git(file.parent, "describe", "--always", "--dirty") if tracked else ""


def _git(folder: Path, *arguments: str) -> str:
    """What git prints, or "" where it fails."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def peak_bytes(run: Callable[[], Any]) -> int:
    """Returns the most bytes that tensors allocated during `run` held at once, on a CPU.

    torch's own records are the source. The process's resident set would not show it, because it is
    mostly Python, torch and the compiler.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        run()
    result = records.profiler.kineto_results
    changes = [e for e in result.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
