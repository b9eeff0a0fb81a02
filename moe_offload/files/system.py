"""The calls in which operating systems differ, one function each. No other file asks which system it runs on.

            past the page cache            data to the disk    out of the page cache
    Linux   O_DIRECT, by whole pages       fdatasync           posix_fadvise
    macOS   F_NOCACHE, any bytes           fsync               F_NOCACHE while reading
    others  as far as they have these      fsync               not at all

The tests run on Linux. The rest follows the systems' documentation, and is tested by taking calls away.
"""

from __future__ import annotations

import errno
import os
from io import FileIO
from pathlib import Path

DIRECT, UNCACHED, CACHED = "O_DIRECT", "F_NOCACHE", "through the page cache"


def bypass_cache(file: FileIO) -> str:
    """Read `file` past the page cache from now on, and say how: DIRECT wants whole pages. Raises OSError where this
    system, or the file system, does not do that."""
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOSYS, "this system reads through its page cache") from None
    if hasattr(os, "O_DIRECT"):
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_DIRECT)
        return DIRECT
    if hasattr(fcntl, "F_NOCACHE"):
        fcntl.fcntl(file, fcntl.F_NOCACHE, 1)
        return UNCACHED
    raise OSError(errno.ENOSYS, "this system reads through its page cache")


def sync_data(descriptor: int) -> None:
    """Flush what was written to the disk. Raises OSError."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def forget_cached(descriptor: int) -> None:
    """Drop a file that is not read soon from the page cache, on systems that have a call for it."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes_read() -> int | None:
    """Bytes that this process has made the system read from disks, by calls or by touching mapped pages; None where
    the system does not say."""
    try:
        counters = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in counters if line.startswith("read_bytes:"))
    except (OSError, StopIteration):
        return None


def missing_call() -> str | None:
    """The call without which no expert can be read or written here; None where all of them are there."""
    return next((f"os.{name}" for name in ("preadv", "pwrite") if not hasattr(os, name)), None)
