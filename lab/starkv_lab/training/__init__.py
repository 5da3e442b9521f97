"""Trains the shipped agent, and measures its answers."""
