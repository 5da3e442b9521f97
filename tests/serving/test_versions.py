"""What is wrapped in vLLM is checked first, and wrapped once."""

import pytest

from starkv_compile.serving import versions
from starkv_compile.serving.versions import Patch


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda: "0.32.4")

    class Runner:
        def build(self, tokens, rows=1):
            return tokens + rows

    return Runner


def doubled(original):
    def build(self, *args, **kwargs):
        return 2 * original(self, *args, **kwargs)

    return build


def test_a_method_is_wrapped_once(runner):
    patch = Patch(runner, "build", ("self", "tokens"), doubled)
    assert patch.fault == ""
    for _ in range(2):
        patch.apply()
        assert patch.is_applied
        assert patch.fault == ""
        assert runner().build(3, rows=2) == 10
    assert runner.build.__name__ == "build"


def test_another_method_is_named(runner):
    fault = Patch(runner, "build", ("self", "number"), doubled).fault
    assert fault == "Runner.build of vLLM 0.32.4 has other parameters (self, tokens, rows)"
    assert "0.32.4 has no Runner.run" in Patch(runner, "run", ("self",), doubled).fault


@pytest.mark.parametrize(
    ("version", "fits"), [("0.32.0", True), ("0.33.0", False), ("0.3.2", False)]
)
def test_the_tested_versions(monkeypatch, version, fits):
    monkeypatch.setattr(versions, "installed", lambda: version)
    assert (versions.version_fault() == "") == fits
    assert fits or version in versions.version_fault()
