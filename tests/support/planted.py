"""A fault in the middle of a call, for tests of what is left after it."""

import contextlib

import pytest


@contextlib.contextmanager
def planted_fault(module, fault, call):
    """Inside, `module` raises `fault` at its `call`-th call; the block must let it through."""
    calls = iter(range(1, 100))

    def fail(module, args):
        if next(calls) == call:
            raise fault("planted")

    hook = module.register_forward_pre_hook(fail)
    try:
        with pytest.raises(fault, match="planted"):
            yield
    finally:
        hook.remove()
