"""Measures how much memory tensors hold at once during a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


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
