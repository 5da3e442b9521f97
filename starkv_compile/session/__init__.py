"""An agent's steps on one cache."""

from __future__ import annotations

from .agent import AgentSession

__all__ = ["AgentSession"]
