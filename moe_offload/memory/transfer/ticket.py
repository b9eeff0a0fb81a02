"""`Ticket`, a row under way, and `Transfer`, the protocol of what moves rows: start, then wait.

`start` hands a row over, `wait` returns once its bytes are where the next kernel will read them. Several rows, and the
parts of one row, are on their way at once.

    demanded     what a forward needs now          first in, first out
    background   pre-warming, guesses              only while nothing demanded is queued
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from ...observe.timeline import Depth, ReadSpan, Timeline
from ..stores import Store
from ..stores.row_read import RowRead


class Done:
    """An event that is set once, for good. Ctrl-C may come anywhere while somebody waits for it.

    threading.Event has a lock that is taken and given back in Python code: if Ctrl-C comes in between, it stays locked,
    and whoever sets the event, or asks again, waits for ever.
    """

    def __init__(self) -> None:
        self._set, self._gate = False, threading.Lock()
        self._gate.acquire()

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True  # first: to open the gate only helps those who are waiting
        self._open()

    def wait(self, timeout_s: float = -1) -> bool:
        """Whether it is set, at the latest after so many seconds."""
        if not self._set and self._gate.acquire(timeout=timeout_s):
            self._open()  # for the next who waits
        return self._set

    def _open(self) -> None:
        if self._gate.locked():
            try:
                self._gate.release()
            except RuntimeError:  # somebody else has, in between
                pass


class Ticket:
    """A row under way. `error` is what stopped it; `nbytes` counts once it is `done` without one."""

    def __init__(self, layer: int, expert: int, read: RowRead, row_bytes: int, demanded: bool):
        self.layer, self.expert, self.row_bytes, self.demanded = layer, expert, row_bytes, demanded
        self.parts, self.dropped = len(read.parts), 0
        self.queued = deque(read.parts)
        self.unfinished = len(read.parts)  # parts that may still write to the row; the last one counts until `finish`
        self.finish = read.finish
        self.nbytes = 0
        self.error: BaseException | None = None
        self.done = Done()
        self.reads: list[ReadSpan] = []  # what a timeline knows of it

    @property
    def name(self) -> str:
        return f"layer {self.layer}, expert {self.expert}"

    @property
    def begun(self) -> bool:
        """Whether any of its parts has been taken up."""
        return len(self.queued) < self.parts

    @property
    def moved(self) -> int:
        """About how many bytes of the row have been read, or are being read."""
        return self.row_bytes * (self.parts - self.dropped) // self.parts if self.parts else self.row_bytes


class Transfer(Protocol):
    timeline: Timeline | None  # that of the model, while it is recorded
    runs_ahead: bool  # whether the host only launches what the device computes, and must not wait for it

    def start(self, store: Store, layer: int, expert: int, row: memoryview, demanded: bool = True) -> Ticket:
        """Begin to fill `row` (writable bytes of one slot) with that expert. Errors of the store may surface here."""

    def together(self, most: int) -> AbstractContextManager[object]:
        """The rows that are started while it is entered may be launched when it ends, up to `most` by one call; none is
        waited for within. After an error all of them are to be cancelled."""

    def wait(self, ticket: Ticket) -> int:
        """Return the bytes moved, once the row is complete. Errors of the store surface here too."""

    def arrived(self, ticket: Ticket) -> bool:
        """Whether the row is complete where it is computed, or has failed: to wait for it would take no time."""

    def stalled_s(self, layer: int) -> float:
        """Seconds that the device has waited for rows of `layer` while the host did not; each is told once, late."""

    def get_going(self) -> None:
        """Return once as much as can be on its way at once is; the caller is about to keep every core busy."""

    def send(self, values: Tensor) -> Tensor:
        """A few numbers of the host, where the device computes. Nothing waits; do not change `values` afterwards."""

    def hurry(self, ticket: Ticket) -> None:
        """A row that was started in the background is needed now."""

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        """Drop what has not begun, and return when nothing writes into these rows any more."""

    def under_way(self) -> list[Ticket]:
        """Every row that may still be written to, also one whose ticket its caller never got (Ctrl-C in `start`)."""

    def depth(self) -> Depth:
        """What is queued and under way: all zero once every row has been waited for."""

    def current(self) -> AbstractContextManager[object]:
        """While it is entered, what this thread launches is launched on the device that rows are moved to."""

    def refuse_capture(self, name: str) -> None:
        """Raise `OffloadError` if what is launched now is being recorded, not run: module `name` needs the host."""

    def close(self) -> None: ...
