"""Says once what a user waits for: the first compilation of a prompt and of decoding."""

from __future__ import annotations

import logging

from ..reporting import GraphReport

log = logging.getLogger("starkv")

_said: set[str] = set()  # in this process


def announce(report: GraphReport) -> None:
    """Logs a line before Inductor compiles the first graph of its kind. report: of that graph."""
    kind = "a prompt" if report.found else "decoding" if report.decode_sites else ""
    if kind and kind not in _said:
        _said.add(kind)
        log.warning(
            "starkv: Inductor compiles the model for %s, once. This takes from seconds to minutes; "
            'later processes find most of it in the cache on disk. inner="eager" starts at once.',
            kind,
        )
