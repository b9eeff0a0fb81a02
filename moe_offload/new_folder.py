"""A folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from .errors import PackError
from .sizes import format_size


def check_new(out: Path) -> None:
    """Raise `PackError` unless a folder `out` can be made: nothing there, or an empty folder; something above it."""
    if out.is_dir() and not out.is_symlink():
        if next(out.iterdir(), None) is not None:
            raise PackError(
                f"{out}: exists and is not empty; nothing in it is touched. Remove it or give another name."
            )
    elif out.exists() or out.is_symlink():
        raise PackError(f"{out}: a folder is to be written there, but it is a file or a link. Give another name.")
    elif not out.absolute().parent.is_dir():
        raise PackError(f"{out}: the folder {out.parent} it is to be in does not exist. Make it first.")


@contextlib.contextmanager
def new_folder(out: Path, needed_bytes: int) -> Iterator[Path]:
    """A hidden folder next to `out`, to be filled; renamed to `out` at the end, after everything has reached the disk.

    An error or an interruption removes it instead. Raises `PackError` stating bytes needed and free when there is no
    room, before anything is written if that can be told, and for any other `OSError` of the body.
    """
    check_new(out)
    folder = out.absolute().parent / f".{out.absolute().name}-{uuid.uuid4().hex[:8]}.packing"
    try:
        if shutil.disk_usage(folder.parent).free < needed_bytes:
            raise _no_room(out, needed_bytes, "the disk is too full")
        folder.mkdir()
        yield folder
        for file in folder.iterdir():
            _sync(file)
        _sync(folder)
        folder.rename(out)
        _sync(folder.parent)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)  # before free bytes are told
        raise _no_room(out, needed_bytes, str(error)) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_room(out: Path, needed_bytes: int, why: str) -> PackError:
    try:
        free_bytes = shutil.disk_usage(out.absolute().parent).free
        free = f"{free_bytes} bytes ({format_size(free_bytes)}) are free"
    except OSError:
        free = "how much is free cannot be told"
    return PackError(
        f"{out}: cannot be written: {why}. It needs {needed_bytes} bytes ({format_size(needed_bytes)}), {free}. "
        "Nothing was left behind; free some space, or give a folder on another disk."
    )
