"""Files that are whole or not there, and a try before work that takes long."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from .errors import StarKVError

__all__ = ["check_writable", "replace_file"]


def check_writable(file: Path, option: str) -> None:
    """Makes the folder of `file`, and tries to write there. Call it before work that takes long.

    Args:
        file: what will be written.
        option: the option that gave its name, for the error.

    Raises:
        StarKVError: no file can be written there, or `file` is a folder.
    """
    try:
        if file.is_dir():
            raise IsADirectoryError("it is a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent) as tried:
            tried.write(b"\0" * 4096)
            tried.flush()
    except OSError as error:
        why = error.strerror or error
        raise StarKVError(f"{file} cannot be written ({why}); give another {option}") from error


def replace_file(file: Path, data: bytes) -> None:
    """Writes `data` to a new file next to `file`, and puts it in its place when it is on the disk.

    A crash at any time leaves the old file or the new one. A symbolic link stays one.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        _replace(Path(os.path.realpath(file)), data)
    except OSError as error:
        if error.filename is None:
            raise
        # The name of the new file, which is gone, would say nothing to the user.
        raise OSError(error.errno, error.strerror, str(file)) from error


def _replace(file: Path, data: bytes) -> None:
    mode = file.stat().st_mode & 0o777 if file.exists() else 0o666 & ~_umask()
    number, name = tempfile.mkstemp(prefix=f"{file.name}.", suffix=".tmp", dir=file.parent)
    try:
        with open(number, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(number)
        os.chmod(name, mode)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(file.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Puts a new name on the disk, where the system can do so."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
