"""Something happens right after a chosen change that our files make to the file system: an error, Ctrl-C, a kill."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moe_offload

PACKAGE = Path(moe_offload.__path__[0])
WATCHED = (str(PACKAGE / "files"), str(PACKAGE / "checkpoint" / "new_folder.py"))
CHANGES = {
    "replace",
    "rename",
    "link",
    "symlink",
    "unlink",
    "mkdir",
    "rmdir",
    "open",
    "fsync",
}  # what may leave files otherwise


class Fault:
    """Calls `what` right after the `at`th change that the watched files make by way of the operating system."""

    def __init__(self, at: int = 0, what: Callable[[], object] = lambda: None):
        self.at, self.what, self.seen = at, what, 0

    def __call__(self, frame: Any, event: str, function: Any) -> None:
        if event == "c_return" and getattr(function, "__module__", "") == "posix" and function.__name__ in CHANGES:
            while frame is not None and not frame.f_code.co_filename.startswith(WATCHED):
                frame = frame.f_back
            if frame is not None:
                self.seen += 1
                if self.seen == self.at:
                    self.what()

    def __enter__(self) -> Fault:
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


def full() -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def interrupt() -> None:
    raise KeyboardInterrupt
