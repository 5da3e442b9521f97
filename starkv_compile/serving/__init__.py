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

    If this vLLM is not one that was tested, it stays as it is, and refuses the option.
    """
    from .versions import refuse_options, version_fault

    fault = version_fault()
    if not fault:
        from .patches import all_patches

        patches = all_patches()
        fault = next((patch.fault for patch in patches if patch.fault), "")
    if fault:
        refuse_options(fault)
        return
    from .backends import wrap_backends
    from .scheduling import register_spec

    register_spec()
    wrap_backends()
    for patch in patches:
        patch.apply()


__all__ = ["register"]
