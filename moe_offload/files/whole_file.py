"""A file that is written whole or not at all: at every moment the old or the new one is there, also after a crash."""

from __future__ import annotations

import contextlib
import os
import stat
import time
import uuid
from pathlib import Path

from .opened import create_nameless, create_private, give_name, open_descriptor

STALE_S = 3600.0  # a temporary file older than this was left by a process that died while saving


def save_whole(path: Path, data: bytes, what: str, error: type[Exception]) -> Path:
    """Put `data` at `path` and return it. Whatever fails is an `error` that names the file as `what`.

    The folder must be there. A symlink at `path` is replaced, not followed. The file is readable by its owner only.
    """
    try:
        _replace(path, data)
    except (OSError, ValueError) as found:
        raise error(
            f"{what} {os.fspath(path)!r} was not saved: {describe_error(found)}. What was there before is unchanged; "
            "choose a writable folder with free space"
        ) from found
    return path


def describe_error(error: Exception) -> str:
    """What went wrong, in words that fit into a sentence of ours."""
    return f"{error.strerror} (errno {error.errno})" if isinstance(error, OSError) and error.errno else str(error)


def sync_file(path: Path) -> None:
    """Flush a file to the disk. Raises OSError."""
    with open_descriptor(path) as descriptor:
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk. Where a file system cannot, a crash may bring the old ones back."""
    with contextlib.suppress(OSError):
        sync_file(folder)


def _replace(path: Path, data: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        # Following links, to see "/dev/stdout": as root, replacing a device by a file would break the machine.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("there is something other than a regular file at that path")
    temporary = path.parent / f".moe_offload-{uuid.uuid4().hex[:8]}.tmp"
    try:
        with create_nameless(path.parent) or create_private(temporary) as file:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) or 0 :]
            os.fsync(file.fileno())
            found = os.fstat(file.fileno())
            if not found.st_nlink:
                give_name(file, temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)
    _sweep(path.parent, found.st_uid)


def _sweep(folder: Path, owner: int) -> None:
    """Remove temporary files of ours that a process killed while saving has left behind."""
    for stale in folder.glob(".moe_offload-*.tmp"):
        with contextlib.suppress(OSError):
            found = stale.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_uid == owner and time.time() - found.st_mtime > STALE_S:
                stale.unlink()
