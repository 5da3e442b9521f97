"""What a measured number depends on."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch


def environment(device: str = "cpu") -> dict[str, str | int]:
    """Versions, processor and GPU ("none" on the device "cpu"); the commit in a git checkout."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    gpu = torch.cuda.get_device_name() if device == "cuda" else "none"
    return {
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": gpu,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()
