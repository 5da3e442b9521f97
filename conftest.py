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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no process ends with them alone."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """By file, but tests/export has one process, where each model is exported once.

    pytest-xdist's groups would say it shorter; with pytest 9.2 its 3.8 does not see them.
    """
    from xdist.scheduler import LoadFileScheduling

    together = "tests/export/"

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return together if nodeid.startswith(together) else super()._split_scope(nodeid)

    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_finish():
    """Collects garbage less often: a compiler makes so many objects that it took a tenth of the
    tests' time."""
    gc.set_threshold(1_000_000, 50, 1000)


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
