"""Compiled code depends on the source of every op, wherever that is defined."""

import pytest

from starkv_compile.kernels import compiling, ops


@pytest.fixture(autouse=True)
def _as_before():
    recorded, bodies = dict(compiling._recorded), dict(ops.BODIES)
    yield
    compiling._recorded.clear()
    compiling._recorded.update(recorded)
    ops.BODIES.clear()
    ops.BODIES.update(bodies)
    compiling.source_fingerprint.cache_clear()


def written(folder, body):
    """A function of a module of a user's own."""
    file = folder / "own.py"
    file.write_text(f"def own(x):\n    return {body}\n")
    module = {}
    exec(compile(file.read_text(), str(file), "exec"), module)
    return module["own"]


def test_the_ops_of_this_package_are_recorded():
    assert {"novelty_scores", "mixed_scores", "star_scores", "gather_kv"} <= set(
        compiling._recorded
    )


def test_another_body_of_a_user_s_op_is_another_source(tmp_path):
    before = compiling.source_fingerprint()
    compiling.record_source("own", written(tmp_path, "x + 1"))
    first = compiling.source_fingerprint()
    compiling.record_source("own", written(tmp_path, "x + 2"))
    second = compiling.source_fingerprint()
    compiling.record_source("own", written(tmp_path, "x + 1"))
    assert compiling.source_fingerprint() == first
    assert len({before, first, second}) == 3


def test_a_function_without_a_file_is_recorded_by_its_code():
    found = []
    for body in ("x + 1", "x + 2"):
        module = {}
        exec(f"def own(x):\n    return {body}\n", module)
        compiling.record_source("own", module["own"])
        found.append(compiling.source_fingerprint())
    assert found[0] != found[1]


def test_registering_records(tmp_path):
    import torch

    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nfrom starkv_compile.kernels.ops import op\n\n\n"
        "@op\ndef twice_of_a_test(x: torch.Tensor) -> torch.Tensor:\n    return x * 2\n"
    )
    before = compiling.source_fingerprint()
    exec(compile(file.read_text(), str(file), "exec"), {"__name__": "mine"})
    assert compiling.source_fingerprint() != before
    assert torch.equal(torch.ops.starkv.twice_of_a_test(torch.ones(2)), torch.full((2,), 2.0))
