"""Compaction of prompts inside vLLM, as a plugin. See docs/guides/vllm.md.

    vllm serve MODEL --additional-config '{"starkv": {"budget": 0.2}}'

vLLM calls `register` in each of its processes. Without the option, everything stays as it is.

The kept tokens of a prompt of L tokens are written into its last slots, so slots and positions of
later tokens stay as they are. The blocks before them are freed, as those of a sliding window are.
How many tokens that is follows from L alone, so scheduler and workers agree without a message.
"""

from __future__ import annotations


def register() -> None:
    """Registers backends, caches and patches. Harmless if called again.

    Raises:
        StarKVError: a method of vLLM that is wrapped is not the one that was tested.
    """
    from .patches import apply
    from .versions import is_supported, refuse_options

    if not is_supported():
        refuse_options()
        return
    from .backends import wrap_backends
    from .scheduling import register_spec

    register_spec()
    wrap_backends()
    apply()


__all__ = ["register"]
