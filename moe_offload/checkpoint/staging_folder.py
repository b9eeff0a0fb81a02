"""A folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from ..config.sizes import format_size
from ..errors import OffloadError, PackError


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

    An error or an interruption removes it instead. Raises `PackError` as `staging` does.
    """
    check_new(out)
    with staging(out, out.absolute().parent, needed_bytes, PackError) as folder:
        yield folder
        sync_files(folder)
        folder.rename(out)
        sync(folder.parent)


@contextlib.contextmanager
def staging(out: Path, parent: Path, needed_bytes: int, error: type[OffloadError]) -> Iterator[Path]:
    """A hidden folder in `parent` where what is meant for `out` is made. It is gone in the end, whatever happens.

    Raises `error` stating bytes needed and free when there is no room, before anything is written if that can be told,
    and for any other `OSError` of the body.
    """
    folder = parent / f".{out.absolute().name}-{uuid.uuid4().hex[:8]}.partial"
    try:
        if shutil.disk_usage(parent).free < needed_bytes:
            raise _no_room(out, needed_bytes, "the disk is too full", error)
        folder.mkdir()
        yield folder
    except OSError as found:
        shutil.rmtree(folder, ignore_errors=True)  # before free bytes are told
        raise _no_room(out, needed_bytes, str(found), error) from found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync_files(folder: Path) -> None:
    """See every file of `folder`, and their names, to the disk."""
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_room(out: Path, needed_bytes: int, why: str, error: type[OffloadError]) -> OffloadError:
    try:
        free_bytes = shutil.disk_usage(out.absolute().parent).free
        free = f"{free_bytes} bytes ({format_size(free_bytes)}) are free"
    except OSError:
        free = "how much is free cannot be told"
    return error(
        f"{out}: cannot be written: {why}. It needs {needed_bytes} bytes ({format_size(needed_bytes)}), {free}. "
        "Nothing was left behind; free some space, or give a folder on another disk."
    )
