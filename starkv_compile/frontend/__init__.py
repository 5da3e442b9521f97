"""The public functions, and what happens around each call of a compiled model."""

from __future__ import annotations

from .api import compile, compiled, last_report, report, undo

__all__ = ["compile", "compiled", "last_report", "report", "undo"]
