"""Changes to the files of a folder that are taken back, last first, when one of them fails."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from .whole_file import sync_file


class NotTakenBack(OSError):
    """A step could not be undone: what it replaced or removed is still in the folder where it is kept."""


class Moves:
    """What was replaced or removed is kept in the folder `aside`, on the same file system, until all is done.

    Each step notes how it is taken back before it is made, so an interruption between the two does no harm. A kill
    takes nothing back: the caller orders the steps so that what lies there is of use after every one of them.
    """

    def __init__(self, aside: Path):
        self.aside, self._numbers = aside, itertools.count()
        self._undo: list[Callable[[], object]] = []

    def put(self, source: Path, target: Path) -> None:
        """Rename `source` to `target`. What is there before is there until then."""
        self._keep_or_forget(target)
        source.replace(target)

    def put_text(self, text: str, target: Path) -> None:
        """Write a file, whole, in place of what is there."""
        source = self._new_name(target)
        with source.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.put(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Let `target`, which is not there, be the file `source` as well; a copy where a file has one name only."""
        self._undo.append(lambda: target.unlink(missing_ok=True))
        link_or_copy(source, target)

    def put_link(self, text: str, target: Path) -> None:
        """Let `target` be a symbolic link that says `text`."""
        source = self._new_name(target)
        source.symlink_to(text)
        self.put(source, target)

    def make_folder(self, target: Path) -> None:
        self._undo.append(lambda: shutil.rmtree(target, ignore_errors=True))
        target.mkdir()

    def remove(self, target: Path) -> None:
        kept = self._new_name(target)
        self._undo.append(lambda: os.path.lexists(kept) and kept.replace(target))
        target.replace(kept)

    def take_back(self) -> None:
        """Undo every step, the last first. One that cannot be undone does not keep the others from it.

        Raises `NotTakenBack`; what could not be put back is then still in `aside`.
        """
        failed: list[OSError] = []
        while self._undo:
            try:
                self._undo.pop()()
            except OSError as error:
                failed.append(error)
        if failed:
            raise NotTakenBack(failed[0].errno, failed[0].strerror, failed[0].filename) from failed[0]

    def _keep_or_forget(self, target: Path) -> None:
        """Note what a new `target` is undone by: the old one put back, or nothing left there."""
        if os.path.lexists(target):
            kept = self._new_name(target)
            link_or_copy(target, kept)
            self._undo.append(lambda: kept.replace(target))
        else:
            self._undo.append(lambda: target.unlink(missing_ok=True))

    def _new_name(self, target: Path) -> Path:
        return self.aside / f"{next(self._numbers)}-{target.name}"


@contextlib.contextmanager
def all_or_nothing(aside: Path) -> Iterator[Moves]:
    """Moves that are taken back after any error or interruption of the body. `aside` is made, and left there."""
    aside.mkdir()
    moves = Moves(aside)
    try:
        yield moves
    except BaseException:
        moves.take_back()
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or where a file has one name only a copy; a link is taken as the link that it is."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # FAT, some network and FUSE file systems: a file has one name there
        shutil.copy2(source, target, follow_symlinks=False)
        if not target.is_symlink():  # which would be followed
            sync_file(target)
