"""Files that are whole or not there."""

import os
import stat

import pytest

from starkv_compile import StarKVError
from starkv_compile.files import check_writable, replace_file


def test_a_file_is_replaced_whole(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    file.write_bytes(b"old")
    file.chmod(0o640)
    replace_file(link, b"new")
    assert link.is_symlink()
    assert file.read_bytes() == b"new"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"old")

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(file, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_bytes() == b"old"


@pytest.mark.parametrize("name", [".", "none/file"], ids=["a folder", "in no folder"])
def test_an_error_names_the_file_that_was_asked_for(tmp_path, name):
    with pytest.raises(OSError, match=r"[Dd]irectory|denied") as caught:
        replace_file(tmp_path / name, b"new")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / name), None)
    assert list(tmp_path.iterdir()) == []


def test_a_place_is_tried_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "file", "--out")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(StarKVError, match=r"file/page\.html cannot be written .*another --out$"):
        check_writable(tmp_path / "file" / "page.html", "--out")
    with pytest.raises(StarKVError, match="it is a folder"):
        check_writable(tmp_path, "--out")
