"""Shared fixtures: poisoned memory, a fresh Dynamo, quiet warnings made loud."""

import gc
import logging
import sys
from collections import Counter

import pytest
import torch

from starkv_compile.kernels.compiling import in_process

THREADS = 1
"""In every test, as in `make test`: Dynamo fails if the number changes while it traces."""


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items):
    """Tests that share what they make have one process: those of a file, or a group of files.

    Groups with slow tests come first, so that no process ends with them alone.
    """
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(
                pytest.mark.xdist_group(str(item.path.relative_to(item.config.rootpath)))
            )
    yield
    slow = Counter(_group(item) for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[_group(item)])


def _group(item):
    return item.get_closest_marker("xdist_group").args[0]


def pytest_collection_finish():
    """Collects garbage less often: a compiler makes so many objects that it took a tenth of the
    tests' time."""
    gc.set_threshold(100_000, 20, 10)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    _trace_nothing()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    _trace_nothing()


def _trace_nothing():
    """pytest listens to every logger. Torch would print every graph and guard for it."""
    logging.getLogger("torch.__trace").handlers.clear()


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """`torch.empty` and its kin give NaN (or a huge integer) when called from the package.

    A kernel that reads what it never wrote then fails a test instead of passing by luck.
    """

    def poison(make):
        def wrapped(*args, **kwargs):
            tensor = make(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith(("starkv_compile", "starkv_lab")) and type(tensor) is torch.Tensor:
                huge = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
                tensor.fill_(huge)
            return tensor

        return wrapped

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.set_num_threads(THREADS)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # reset leaves what earlier tests ran into
    with in_process():  # a changed kernel is never tested by what was compiled before
        yield
    torch._dynamo.reset()
