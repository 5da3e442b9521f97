"""The command `starkv`. Other packages add commands to it (entry points `starkv.commands`)."""

from __future__ import annotations

from .command_line import main
from .options import add_method, add_nbits, config_of, importing, progress, share_of, shares_of

__all__ = [
    "add_method",
    "add_nbits",
    "config_of",
    "importing",
    "main",
    "progress",
    "share_of",
    "shares_of",
]
