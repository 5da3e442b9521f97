"""A measured number names the commit it was measured at, and no other project's."""

import subprocess

import pytest
from starkv_lab import __version__, environment


def git(folder, *arguments):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "tracked.py").touch()
    git(tmp_path, "init")
    git(tmp_path, "add", "tracked.py")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_the_commit_of_a_tracked_file(checkout):
    commit = environment.commit_of(checkout / "tracked.py")
    assert len(commit) >= 7
    (checkout / "tracked.py").write_text("changed")
    assert environment.commit_of(checkout / "tracked.py") == f"{commit}-dirty"


def test_a_file_that_only_lies_in_a_checkout_has_none(checkout):
    packages = checkout / ".venv" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "installed.py").touch()
    assert environment.commit_of(packages / "installed.py") == ""


def test_without_git_the_version_stands_in(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.environment()["commit"] == __version__
