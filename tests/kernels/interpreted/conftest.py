"""Kernels run by Triton's interpreter, on the CPU: `make test-interpreted`.

The interpreter is chosen when a kernel is defined, so these tests need a process of their own
with TRITON_INTERPRET=1; in any other they are not collected.

It differs from a device in ways that would hide faults. Here they fail: memory that was never
written is NaN, every buffer lies between guard bands that must stay as they are, programs run in
a shuffled order, and bfloat16, whose arithmetic the interpreter does on bit patterns, may only
be multiplied by `tl.dot` or cast.
"""

import os
import random

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]
GUARD = 64  # elements on each side


def _garbage(tensor):
    if tensor.dtype == torch.bool:
        return True
    return torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max


class Guards:
    """Allocates tensors between bands, and checks that the bands are what they were."""

    def __init__(self):
        self.bands = []

    def empty(self, shape, dtype):
        count = int(np.prod(shape)) if len(shape) else 1
        whole = torch.empty(count + 2 * GUARD, dtype=dtype)
        whole.fill_(_garbage(whole))
        self.bands += [whole[:GUARD], whole[GUARD + count :]]
        return whole[GUARD : GUARD + count].view(tuple(shape))

    def copy(self, tensor):
        """`tensor` between bands, strides kept contiguous."""
        guarded = self.empty(tensor.shape, tensor.dtype)
        return guarded.copy_(tensor)

    def check(self):
        for band in self.bands:
            intact = band.isnan() if band.is_floating_point() else band == _garbage(band)
            assert intact.all(), "a kernel wrote beyond its buffer"


@pytest.fixture(autouse=True)
def guards(monkeypatch, _poisoned_memory):
    """Every allocation of a wrapper is guarded; tests guard their inputs with `guards.copy`."""
    made = Guards()

    def one_shape(shape):
        """`(2, 3)` of both `empty(2, 3)` and `empty((2, 3))`."""
        return shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape

    def new_empty(tensor, *shape, dtype=None, **_):
        return made.empty(one_shape(shape), dtype or tensor.dtype)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda t, **_: made.empty(t.shape, t.dtype))

    def zeros(*shape, dtype=torch.float32, **_):
        return made.empty(one_shape(shape), dtype).zero_()

    monkeypatch.setattr(torch, "zeros", zeros)
    # The interpreter allocates for itself as well, by the real one.
    real_empty = torch.empty

    def empty(*shape, dtype=None, **kwargs):
        if kwargs.get("device") is None or dtype is None:
            return real_empty(*shape, dtype=dtype, **kwargs)
        return made.empty(shape, dtype)

    monkeypatch.setattr(torch, "empty", empty)
    yield made
    made.check()


@pytest.fixture(autouse=True)
def _interpreter_like_a_device(monkeypatch):
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    create_dot, binary_op, unary_op = builder.create_dot, builder.binary_op, builder.unary_op

    def is_bf16(handle):
        return str(getattr(handle.dtype, "scalar", handle.dtype)) == "bf16"

    def widen(self, handle):
        import triton.language as tl

        return self.cast_impl(handle, tl.float32) if is_bf16(handle) else handle

    def dot(self, a, b, d, *rest):
        return create_dot(self, widen(self, a), widen(self, b), d, *rest)

    def refuse(operation):
        def wrapped(self, *handles):
            tensors = [h for h in handles if hasattr(h, "dtype") and hasattr(h, "data")]
            assert not any(is_bf16(h) for h in tensors), "bfloat16 arithmetic outside tl.dot"
            return operation(self, *handles)

        return wrapped

    def number_of_two(choose):
        """As on a device, and unlike Triton 3.6's interpreter: the one that is a number."""
        return lambda self, lhs, rhs: self.binary_op(lhs, rhs, choose)

    monkeypatch.setattr(builder, "create_maxnumf", number_of_two(np.fmax))
    monkeypatch.setattr(builder, "create_minnumf", number_of_two(np.fmin))
    monkeypatch.setattr(builder, "create_dot", dot)
    monkeypatch.setattr(builder, "binary_op", refuse(binary_op))
    monkeypatch.setattr(builder, "unary_op", refuse(unary_op))

    set_grid_idx = builder.set_grid_idx
    order = {}

    def shuffled(self, x, y, z):
        """Program (x, y, z) runs as another one, each exactly once."""
        grid = tuple(self.grid_dim)
        if (x, y, z) == (0, 0, 0) or grid not in order:
            places = [
                (i, j, k) for i in range(grid[0]) for j in range(grid[1]) for k in range(grid[2])
            ]
            names = list(places)
            random.Random(len(places)).shuffle(names)
            order[grid] = dict(zip(places, names, strict=True))
        set_grid_idx(self, *order[grid][x, y, z])

    monkeypatch.setattr(builder, "set_grid_idx", shuffled)
