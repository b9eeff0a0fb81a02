"""Memory that stays where it is: slots and scratch that the system may neither swap out nor compress.

A cache that is swapped out is read twice, once by us and once by the system. Systems let a process lock only so much
(RLIMIT_MEMLOCK), so by itself it is done as far as that allows, and where the budget is most of the machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import sys
from pathlib import Path

from torch import Tensor

from ..config.sizes import format_size
from ..errors import ConfigError
from .buffers import Rows

logger = logging.getLogger("moe_offload")

MOST_OF_THE_MACHINE = 0.5  # budgets above this share of its memory are locked by themselves
ON_FAULT = 1  # of mlock2: lock each page once it is used, and take none for a slot that is never filled
CAP_IPC_LOCK = 14
STATUS = Path("/proc/self/status")
RAISE = "raise the limit (`ulimit -l`, or LimitMEMLOCK= of a systemd unit)"


class MemoryLock:
    """Locks buffers until `most` bytes are locked; `nbytes` are. Once the system has refused one, no more are tried."""

    def __init__(self, most: int = 0):
        self.most, self.nbytes = most, 0
        self._held: dict[int, int] = {}

    def lock(self, buffer: Tensor) -> None:
        """Lock `buffer`, as a whole or not at all."""
        size = buffer.numel() * buffer.element_size()
        if not size or self.nbytes + size > self.most:
            return
        failed = _lock_pages(buffer.data_ptr(), size)
        if failed:
            self.most = self.nbytes
            logger.warning(
                "%s of expert slots and scratch are locked in memory, and no more: %s; %s",
                format_size(self.nbytes), os.strerror(failed), RAISE,
            )  # fmt: skip
            return
        self._held[buffer.data_ptr()] = size
        self.nbytes += size

    def keep(self, rows: Rows) -> Rows:
        """The same rows, locked if they may be."""
        self.lock(rows.bytes)
        return rows

    def check(self, nbytes: int) -> None:
        """Raise ConfigError where fewer are locked: the system has refused what its limit allows."""
        if self.nbytes < nbytes:
            raise ConfigError(
                f"lock_memory=True: the system has locked {format_size(self.nbytes)} of {format_size(nbytes)} of slots "
                f"and scratch, and refused the rest; {RAISE}, or use lock_memory='auto' for as much as may be"
            )

    def unlock(self, *buffers: Tensor) -> None:
        """Before they are given back: the heap may give their pages to somebody else."""
        for address in (buffer.data_ptr() for buffer in buffers):
            if size := self._held.pop(address, 0):
                _unlock_pages(address, size)
                self.nbytes -= size


def bytes_to_lock(asked: str | bool, needed: int, budget: int, machine: int) -> int:
    """How many of the `needed` bytes of slots and scratch are to be locked. Raises ConfigError where all of them were
    asked for (True), and may not be."""
    if asked is False or (asked == "auto" and budget <= MOST_OF_THE_MACHINE * machine):
        return 0
    allowed = allowed_bytes()
    if allowed >= needed:
        return needed
    if asked is True:
        raise ConfigError(
            f"lock_memory=True asks for {format_size(needed)} of slots and scratch to be locked, and this process may "
            f"lock {format_size(allowed)}: {RAISE}, use a smaller budget, or lock_memory='auto' for as much as may be"
        )
    logger.info(
        "%s of %s of slots and scratch are locked in memory, the rest may be swapped out: %s",
        format_size(allowed), format_size(needed), RAISE,
    )  # fmt: skip
    return allowed


def allowed_bytes() -> int:
    """How much more this process may lock. Its soft limit is raised to the hard one, which needs no right."""
    try:
        import resource

        ctypes.CDLL(None).mlock  # noqa: B018  which some systems do not have
        soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    except (ImportError, AttributeError, TypeError, OSError):
        return 0
    if hard == resource.RLIM_INFINITY or _status("CapEff", 16) >> CAP_IPC_LOCK & 1:
        hard = sys.maxsize
    elif soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    return max(0, hard - _status("VmLck") * 1024)


def _lock_pages(address: int, size: int) -> int:
    """The error number of locking these bytes; 0 where they are locked."""
    library = ctypes.CDLL(None, use_errno=True)
    pages = ctypes.c_void_p(address), ctypes.c_size_t(size)
    with contextlib.suppress(AttributeError):  # not Linux, or an old C library
        if library.mlock2(*pages, ON_FAULT) == 0:
            return 0
        if ctypes.get_errno() != errno.ENOSYS:
            return ctypes.get_errno()
    return 0 if library.mlock(*pages) == 0 else ctypes.get_errno()


def _unlock_pages(address: int, size: int) -> None:
    ctypes.CDLL(None).munlock(ctypes.c_void_p(address), ctypes.c_size_t(size))


def _status(name: str, base: int = 10) -> int:
    """A number of /proc/self/status; 0 where there is none."""
    with contextlib.suppress(OSError, ValueError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1], base)
    return 0
