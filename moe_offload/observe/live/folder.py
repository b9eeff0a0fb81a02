"""Where the sockets of running models are: a folder that only its owner can enter.

    $XDG_RUNTIME_DIR/moe_offload/        or, where there is none,        <temporary folder>/moe_offload-<uid>/
        4242.sock                        the first model of process 4242
        4242-2.sock                      its second

A model takes the first folder that it may use; `moe-offload top` looks into both, as its environment may be another.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

SUFFIX = ".sock"


def list_folders() -> list[Path]:
    """The folders that may hold sockets, the best first."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    first = [Path(runtime) / "moe_offload"] if Path(runtime).is_absolute() and Path(runtime).is_dir() else []
    return [*first, Path(tempfile.gettempdir()) / f"moe_offload-{os.getuid()}"]


def make_private(folder: Path) -> None:
    """Make sure that `folder` is there and private. Raises OSError, and ValueError where it is somebody else's."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    check_private(folder)


def check_private(folder: Path) -> None:
    """Raise ValueError unless `folder` is a folder of ours that nobody else may enter, OSError where there is none.

    In a shared temporary folder anybody may have made it first, or a link to elsewhere in its place.
    """
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{folder} is not a folder (or a link to one)")
    if found.st_uid != os.getuid():
        raise ValueError(f"{folder} belongs to user {found.st_uid}, not to us ({os.getuid()})")
    if found.st_mode & 0o077:
        raise ValueError(f"{folder} can be entered by others (mode {found.st_mode & 0o777:o}); chmod 700 {folder}")
