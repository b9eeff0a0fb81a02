"""The lock of one model, which a process that was forked from the model's own is refused instead of waiting for it.

After a fork the child has the lock as it was at that moment: held, perhaps, by a thread that the child does not have.
To wait for it is to wait for ever, so whoever asks for it there is told why at once, on every way in.
"""

from __future__ import annotations

import os
import threading

from ..errors import ClosedError


class ModelLock:
    """A lock for `with lock.here():`, of the process that made it.

    The check comes before the lock is entered, and not in an `__enter__` of our own: a Ctrl-C that arrived between the
    two would leave a lock that nobody gives back.
    """

    def __init__(self) -> None:
        self._lock, self._pid = threading.RLock(), os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is the process that made it, and not one forked from it."""
        return os.getpid() == self._pid

    def here(self) -> threading.RLock:
        """The lock itself. Raises `ClosedError` in a forked process."""
        if not self.is_here:
            raise ClosedError(
                "this process was forked from the one that offloaded the model, and neither its lock nor the threads "
                "that read experts work in it; load the model in the process that runs it (for multiprocessing, use "
                "the 'spawn' method)"
            )
        return self._lock


def closed_error(name: str) -> ClosedError:
    return ClosedError(
        f"{name}: its expert cache was closed (close(), or leaving its `with` block); load the model again to use it"
    )
