"""Reading a small file of unknown origin: regular, of bounded size, and one kind of error for all that is wrong."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .opened import open_descriptor
from .strict_json import describe_problems
from .whole_file import describe_error


@contextlib.contextmanager
def refusing_file(path: str | os.PathLike[str], what: str, remedy: str, error: type[Exception]) -> Iterator[None]:
    """Whatever the block finds wrong with the file at `path` is an `error` that names `what` it is and the remedy.

    The block may raise OSError, ValueError (pydantic's too) and RecursionError.
    """
    try:
        yield
    except RecursionError as found:
        raise error(f"{what} {os.fspath(path)!r} cannot be used: it is nested too deep. {remedy}") from found
    except (OSError, ValueError) as found:
        from pydantic import ValidationError  # not above: settings import this file, need no pydantic, and load sooner

        if isinstance(found, ValidationError):  # not its own text, which prints the untrusted values
            raise error(f"{what} {os.fspath(path)!r} cannot be used: {describe_problems(found)}. {remedy}") from None
        raise error(f"{what} {os.fspath(path)!r} cannot be used: {describe_error(found)}. {remedy}") from found


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """All of a regular file. Raises ValueError where it is larger or something else, and OSError."""
    with open_regular(path) as (file, size):
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"it has {max(size, len(data))} bytes, the limit is {max_bytes}")
    return data


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file at `path`, open for reading, and its size. A FIFO must not block us, a device must not feed us for ever.

    Raises ValueError when it is not a regular file, OSError when it cannot be opened.
    """
    # Opened before it is looked at: a check of the name would race with its replacement.
    with open_descriptor(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)) as descriptor:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            yield file, found.st_size
