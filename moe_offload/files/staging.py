"""A hidden folder where files are made before they get their names; folders that killed processes left are removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from .opened import open_descriptor

STALE_S = 24 * 3600.0  # a folder unchanged for so long is removed where no lock can tell whether its process lives
PARTIAL = ".partial"  # how the names of such folders end
NEW_S = 60.0  # an empty folder younger than this may not have been locked yet


@contextlib.contextmanager
def staging_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent` for what will be called `name`. It is gone in the end, unless it was renamed.

    It is locked as long as the block runs, and the kernel ends a lock with its process: that is how the next one knows
    what nobody will come back to, and removes it. Raises OSError.
    """
    sweep_stale_folders(parent)
    folder = parent / f".moe_offload-{name[:100]}-{uuid.uuid4().hex[:8]}{PARTIAL}"
    try:
        folder.mkdir()
        with open_descriptor(folder) as descriptor:
            _lock(descriptor)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_stale_folders(parent: Path) -> None:
    """Remove the folders of `staging_folder` that killed processes of this user have left in `parent`."""
    for folder in parent.glob(f".moe_offload-*-????????{PARTIAL}"):
        with (
            contextlib.suppress(OSError),
            open_descriptor(folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)) as descriptor,
        ):
            found = os.fstat(descriptor)
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and _is_left(folder, descriptor, found):
                shutil.rmtree(folder, ignore_errors=True)


def _is_left(folder: Path, descriptor: int, found: os.stat_result) -> bool:
    age_s = time.time() - found.st_mtime
    locked = _lock(descriptor)
    if locked is None:
        return age_s > STALE_S
    return locked and (age_s > NEW_S or next(folder.iterdir(), None) is not None)


def _lock(descriptor: int) -> bool | None:
    """Whether the folder could be locked; None where the file system, or the platform, has no locks on folders."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True
