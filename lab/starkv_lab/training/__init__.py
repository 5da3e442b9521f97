"""Trains the demo agent, and measures its answers."""
