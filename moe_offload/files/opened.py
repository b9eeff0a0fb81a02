"""Files that are open, and whose descriptors are closed also when Ctrl-C comes while they are being opened.

`fd = os.open(...)` is two steps: an interrupt between them leaves a number that nobody will close. A `FileIO` owns its
descriptor from the first moment on and closes it when it is dropped, so a file that is kept open is a `FileIO`. A
folder, or a file that is opened with other flags, cannot be one: `open_descriptor` closes those at the end of a block.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from io import FileIO
from pathlib import Path

from .system import CACHED, bypass_cache

DESCRIPTORS = Path("/proc/self/fd")


@contextlib.contextmanager
def open_descriptor(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """The descriptor of `path`, for the time of a block. Raises OSError."""
    held: list[int] = []
    try:
        held.extend(map(os.open, [path], [flags | getattr(os, "O_CLOEXEC", 0)]))  # one step: all of it is C
        yield held[0]
    finally:
        for descriptor in held:
            os.close(descriptor)


def create_private(path: Path) -> FileIO:
    """A new file for reading and writing that nobody but its owner may open. Raises OSError where one is there."""
    return FileIO(path, "x+", opener=partial(os.open, mode=0o600))


def create_nameless(folder: Path) -> FileIO | None:
    """The same without a name, so that nothing is left of it when this process is killed; None where that is not to be
    had: not Linux, or a file system that cannot."""
    flags = getattr(os, "O_TMPFILE", 0) | os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
    if not hasattr(os, "O_TMPFILE") or not DESCRIPTORS.is_dir():
        return None
    try:
        return FileIO(folder, "r+", opener=lambda folder, _: os.open(folder, flags, 0o600))
    except OSError:
        return None


def give_name(file: FileIO, path: Path) -> None:
    """The name `path` for a file that has none. Raises OSError where there is one."""
    # Told any `src_dir_fd`, which an absolute path makes no use of, Python follows the link to the file.
    os.link(DESCRIPTORS / str(file.fileno()), path, src_dir_fd=file.fileno())


def open_uncached(path: Path | str) -> tuple[FileIO, str]:
    """A file for reading past the page cache, or through it where that is refused; and which it is. Raises OSError."""
    file = FileIO(path)
    try:
        return file, bypass_cache(file)
    except OSError:
        return file, CACHED
