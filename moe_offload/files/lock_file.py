"""A lock file: one process at a time holds it, while it reads, changes and writes back a file that several share."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from functools import partial
from io import FileIO
from pathlib import Path

LOOK_S = 0.01


@contextlib.contextmanager
def held(path: Path, within_s: float) -> Iterator[None]:
    """For the time of a block no other process (and no other block) holds the lock file at `path`.

    The system gives it back where its holder dies. Raises OSError: TimeoutError after `within_s` seconds, or where the
    file cannot be made, or files cannot be locked here.
    """
    try:
        import fcntl
    except ImportError:
        raise OSError("files cannot be locked on this system") from None

    with FileIO(path, "a+", opener=partial(os.open, mode=0o600)) as file:  # to append: no file system locks to read
        until = time.monotonic() + within_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # in short tries: a waiting one cannot be ended
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(f"another process has held it for {within_s:.0f} s") from None
                time.sleep(LOOK_S)
        yield  # the lock is given back where the file is closed
