"""What a measured number depends on."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

from . import __version__

HERE = Path(__file__).resolve()


def environment(device: str = "cpu") -> dict[str, str | int]:
    """Versions, processor and GPU ("none" on the device "cpu").

    commit: of the checkout that this package runs from; of an installed package its version.
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
    """The commit of the checkout that tracks `file`; "" where none does, or git is missing.

    A package installed below some other project's checkout is not that project's commit.
    """
    tracked = _git(file.parent, "ls-files", "--error-unmatch", file.name)
    return _git(file.parent, "describe", "--always", "--dirty") if tracked else ""


def _git(folder: Path, *arguments: str) -> str:
    """What git prints; "" where it fails."""
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
