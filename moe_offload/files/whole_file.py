"""A file that is read as hostile input, and written whole or not at all: profiles and traces."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

STALE_S = 3600.0  # a temporary file older than this was left by a process that died while saving


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file at `path`, open for reading, and its size. A FIFO must not block us, a device must not feed us for ever.

    Raises ValueError when it is not a regular file, OSError when it cannot be opened.
    """
    # Opened before it is looked at: a check of the name would race with its replacement.
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a regular file")
        with os.fdopen(fd, "rb", closefd=False) as file:
            yield file, found.st_size
    finally:
        os.close(fd)


def replace(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that at every moment the old or the new file is there, complete, also after a crash.

    A symlink at `path` is replaced, not followed. The file is readable by its owner only. Raises OSError, ValueError.
    """
    with contextlib.suppress(FileNotFoundError):
        # Following links, to see "/dev/stdout": as root, replacing a device by a file would break the machine.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("there is something other than a regular file at that path")
    fd, name = tempfile.mkstemp(prefix=".moe_offload-", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            owner = os.fstat(file.fileno()).st_uid
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    # The new file is in place, complete. Where a file system cannot sync a folder, a crash may bring the old one back.
    with contextlib.suppress(OSError):
        _sync_folder(path.parent)
    _sweep(path.parent, owner)


def reason(error: Exception) -> str:
    """What went wrong, in words that fit into a sentence of ours."""
    return f"{error.strerror} (errno {error.errno})" if isinstance(error, OSError) and error.errno else str(error)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sweep(folder: Path, owner: int) -> None:
    """Remove temporary files of ours that a process killed while saving has left behind."""
    for stale in folder.glob(".moe_offload-*.tmp"):
        with contextlib.suppress(OSError):
            found = stale.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_uid == owner and time.time() - found.st_mtime > STALE_S:
                stale.unlink()
