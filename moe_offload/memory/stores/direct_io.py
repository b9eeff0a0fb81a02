"""Read bytes of a file into memory: past the page cache where that is possible, completely in any case.

    in place    offset, length and addresses are multiples of a page: one O_DIRECT read, straight into the slot
    detour      they are not (in most checkpoints a header of any length comes first): the pages around it into a buffer
                of this thread, then one copy; a quarter of the processor time of a read through the page cache
    buffered    there is no O_DIRECT: an ordinary read, on macOS past the page cache all the same (F_NOCACHE)

After a short read or an interruption the rest is read; after EIO and EAGAIN the read is tried once more.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import numpy as np

from ...errors import ExpertReadError
from ...experts import round_up
from ...files.file_stamp import FileStamp
from ...files.system import CACHED, bypass_cache
from .row_reads import PAGE, PART_BYTES

logger = logging.getLogger("moe_offload")
#: Errors after which a read is tried once more: a link or controller often recovers.
PASSING_ERRORS = (errno.EIO, errno.EAGAIN)
REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_threads = threading.local()


class DataFile:
    """A file opened for reading, twice where O_DIRECT is to be had. Takes `opened` over, if it is open already.

    Both stay open until `close`, even once O_DIRECT has been refused: another thread may be about to read through that
    number, which by then could be another file's.
    """

    def __init__(self, path: Path, opened: FileIO | None = None):
        self.path, self._file = path, opened or FileIO(path)  # a FileIO is closed when nobody has it any more
        self.size = os.fstat(self._file.fileno()).st_size
        self._direct, self._how = _open_direct(self._file)
        self._refused = False

    @property
    def how(self) -> str:
        """How it is read: past the page cache (`files/system.py`), or through it."""
        return CACHED if self._refused else self._how

    def stamp(self) -> FileStamp:
        """Raises OSError."""
        return FileStamp.of(self._file.fileno())

    def read(self, offset: int, buffers: Sequence[memoryview], who: str) -> None:
        """Fill `buffers` with the bytes at `offset`; together at most PART_BYTES. Raises `ExpertReadError`."""
        nbytes = sum(buffer.nbytes for buffer in buffers)
        direct = self._direct
        if direct is not None and not self._refused:
            in_place = offset % PAGE == 0 and all(_address(b) % PAGE == 0 and b.nbytes % PAGE == 0 for b in buffers)
            try:
                if in_place:
                    self._fill(direct.fileno(), offset, list(buffers), nbytes, who)
                else:
                    self._detour(direct.fileno(), offset, buffers, nbytes, who)
                return
            except _Refused as refused:
                logger.info("%s: O_DIRECT is refused (%s); read through the page cache", self.path, refused)
                self._refused = True
        self._fill(self._file.fileno(), offset, list(buffers), nbytes, who)

    def close(self) -> None:
        self._file.close()
        if self._direct is not None:
            self._direct.close()
        self._direct = None

    def _detour(self, direct: int, offset: int, buffers: Sequence[memoryview], nbytes: int, who: str) -> None:
        begin = offset // PAGE * PAGE
        skip = offset - begin
        around = _own_buffer()[: round_up(skip + nbytes, PAGE)]
        self._fill(direct, begin, [around], skip + nbytes, who)
        for buffer in buffers:  # numpy copies without holding the GIL
            np.copyto(np.frombuffer(buffer, np.uint8), np.frombuffer(around[skip : skip + buffer.nbytes], np.uint8))
            skip += buffer.nbytes

    def _fill(self, descriptor: int, offset: int, buffers: list[memoryview], needed: int, who: str) -> None:
        """Read on until at least `needed` bytes have come (the last page of a file may be short)."""
        past_cache = self._direct is not None and descriptor == self._direct.fileno()
        at, retried, stuck = offset, False, False
        while at - offset < needed:
            try:
                count = os.preadv(descriptor, buffers, at)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno in REFUSALS and past_cache:
                    raise _Refused(error.strerror) from None
                if error.errno in PASSING_ERRORS and not retried:
                    retried = True
                    continue
                raise self._failed(offset, at, needed, retried, error, who) from error
            if past_cache and at - offset + count < needed:
                short, count = count, count // PAGE * PAGE  # go on from a whole page: another offset is refused
                if short and not count and not stuck:
                    stuck = True
                    continue
            if count == 0:
                raise ExpertReadError(
                    f"{who}: {self.path} was truncated: {offset + needed - at} bytes are missing at offset {at}; it "
                    f"had {self.size} bytes when it was opened. Restore it and load the model again"
                )
            at += count
            buffers = _after(buffers, count)

    def _failed(self, offset: int, at: int, needed: int, retried: bool, error: OSError, who: str) -> ExpertReadError:
        name = errno.errorcode.get(error.errno or 0, "unknown errno")
        return ExpertReadError(
            f"{who}: reading {offset + needed - at} bytes at offset {at} of {self.path} failed"
            f"{' twice' if retried else ''} with {name} ({error.strerror}). Check the disk or the network mount; the "
            "next call tries again"
        )


class _Refused(Exception):
    """The file system does not do O_DIRECT after all."""


def _open_direct(file: FileIO) -> tuple[FileIO | None, str]:
    """The same file (it may have no name any more) opened by whole pages past the page cache, if that is possible; and
    how it is read."""
    try:
        if not hasattr(os, "O_DIRECT"):
            return None, bypass_cache(file)
        direct = FileIO(f"/proc/self/fd/{file.fileno()}")
        return direct, bypass_cache(direct)
    except OSError as error:  # refused, no /proc, too few descriptors, or a system that cannot
        logger.info("read through the page cache: %s", error)
        return None, CACHED


def _own_buffer() -> memoryview:
    """A page-aligned buffer that belongs to the calling thread, for one part and the pages it begins and ends in."""
    if not hasattr(_threads, "buffer"):
        _threads.buffer = memoryview(mmap.mmap(-1, PART_BYTES + 2 * PAGE))
    buffer: memoryview = _threads.buffer
    return buffer


def _address(buffer: memoryview) -> int:
    return int(np.frombuffer(buffer, np.uint8).__array_interface__["data"][0])


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left to fill after `count` bytes."""
    while buffers and count >= buffers[0].nbytes:
        count -= buffers[0].nbytes
        buffers = buffers[1:]
    return [buffers[0][count:], *buffers[1:]] if buffers else []
