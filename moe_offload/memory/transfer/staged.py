"""Rows into the memory of a device that has its own: staged through pinned host memory, copied on a stream beside.

    store ──reader threads──> staging (pinned) ──copy stream──> slot        rows on disk, or converted
    rows in pinned RAM        ─────────────────────copy stream──> slot      no staging, no thread

Two orders hold, and neither makes the host wait: a copy into a slot begins after the last kernel that read the slot
(`mark`, taken when the row is asked for), and kernels that are launched after `wait` begin after the copy.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ExpertReadError, OffloadError
from ..buffers import page_aligned
from ..stores import Store
from ..stores.host import HostStore
from ..stores.row_read import RowRead
from .streams import CudaStreams, Streams
from .threads import THREADS, TIMEOUT_S, ThreadTransfer
from .ticket import Ticket

STAGING_ROWS = 8  # in flight: two for every reader thread


def cuda_transfer(device: str) -> DeviceTransfer:
    return DeviceTransfer(CudaStreams(torch.device(device)))


@dataclass
class Staging:
    """One pinned buffer, and the end of the last copy out of it."""

    buffer: Tensor
    last: Any = None


class DeviceTicket(Ticket):
    """`copied` is the end of the copy into the slot, once it has been launched."""

    staging: Staging | None = None
    copied: Any = None


class DeviceTransfer(ThreadTransfer):
    """`start` takes the slot as a uint8 tensor `[row_bytes]` of the device; or, for a device that is the CPU, as a
    memoryview."""

    runs_ahead = True

    def __init__(self, streams: Streams, staging_rows: int = STAGING_ROWS, reader_threads: int = THREADS):
        super().__init__(reader_threads)
        self.streams, self._most = streams, staging_rows
        self._spare: dict[int, deque[Staging]] = {}  # row bytes -> buffers that no thread fills
        self._made: dict[int, int] = {}
        self._all: list[Staging] = []
        self._returned = threading.Condition(self._lock)

    def start(self, store: Store, layer: int, expert: int, row: Any, demanded: bool = True) -> Ticket:
        self._check_open()
        row = row if isinstance(row, Tensor) else torch.frombuffer(row, dtype=torch.uint8)
        after, row_bytes = self.streams.mark(), len(row)
        if isinstance(store, HostStore):
            ticket = DeviceTicket(layer, expert, RowRead([], lambda: row_bytes), row_bytes, demanded)
            ticket.copied = self.streams.copy(row, store.rows_EN(layer)[expert], after)
            ticket.nbytes = row_bytes
            ticket.done.set()
            return ticket
        staging = self._take(row_bytes)
        try:
            read = store.begin(layer, expert, memoryview(staging.buffer.numpy()))
        except BaseException:
            self._return(staging)
            raise

        def finish() -> int:
            nbytes = read.finish()
            self._check_open()  # a read that ended after `close`: its slot may have been given to another row by now
            ticket.copied = staging.last = self.streams.copy(row, staging.buffer, after)
            return nbytes

        ticket = DeviceTicket(layer, expert, RowRead(read.parts, finish), row_bytes, demanded)
        ticket.staging = staging
        self._queue(ticket)
        return ticket

    def wait(self, ticket: Ticket) -> int:
        nbytes = super().wait(ticket)
        if not isinstance(ticket, DeviceTicket):
            raise TypeError(f"{ticket.name}: its ticket is of another transfer")
        self.streams.order(ticket.copied)
        return nbytes

    def send(self, values: Tensor) -> Tensor:
        return self.streams.send(values)

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        """As in `Transfer`. A copy that was launched already is not dropped: later launches begin after it, as for
        `wait`."""
        tickets = list(tickets)
        try:
            super().cancel(tickets)
        finally:  # after Ctrl-C, too
            for ticket in tickets if self._here() else ():
                if isinstance(ticket, DeviceTicket) and ticket.copied is not None:
                    self.streams.order(ticket.copied)

    def current(self) -> AbstractContextManager[object]:
        return self.streams.current() if self._here() else contextlib.nullcontext()  # CUDA does not survive a fork

    def refuse_capture(self, name: str) -> None:
        if self.streams.capturing():
            raise OffloadError(
                f"{name}: a CUDA graph is being captured, and this step needs the host, which a captured graph does "
                "not ask: it is a prompt, or the first decode step of its size, or its rows rest on disk. Capture "
                "decode steps only, once one of the same size has run, with all rows in RAM (device_map='cpu', "
                "config={'decide': 'device'}); or none: with compile='inductor' the model makes such graphs itself"
            )

    def close(self) -> None:
        super().close()
        if not self._here():
            return
        staged, self._all = self._all, []
        self._spare.clear()
        with contextlib.ExitStack() as last_first:  # each is unpinned, whatever happens to the others
            for staging in staged:
                last_first.callback(self.streams.unpin, staging.buffer)
            self.streams.drain()

    def _ended(self, ticket: Ticket) -> None:
        if isinstance(ticket, DeviceTicket) and ticket.staging is not None:  # once: what is done may still be cancelled
            staging, ticket.staging = ticket.staging, None
            self._return(staging)
        super()._ended(ticket)

    def _take(self, row_bytes: int) -> Staging:
        """A buffer whose last copy is over. Waits for one: reader threads give them back without our help."""
        with self._lock:
            free = self._spare.setdefault(row_bytes, deque())
            if not free and self._made.get(row_bytes, 0) < self._most:
                made = Staging(page_aligned(row_bytes))
                self._all.append(made)  # first: whatever interrupts the pinning, `close` undoes it
                self.streams.pin(made.buffer)
                free.append(made)
                self._made[row_bytes] = self._made.get(row_bytes, 0) + 1
            staging = free.popleft() if self._returned.wait_for(lambda: free, TIMEOUT_S) else None
        if staging is None:
            raise ExpertReadError(
                f"no staging row of {row_bytes} bytes has come free in {TIMEOUT_S:.0f} s; {self._state()}. The disk or "
                "mount does not answer; if it goes on so, load the model again"
            )
        try:
            if staging.last is not None:
                self.streams.finish(staging.last)
        except BaseException:
            self._return(staging)
            raise
        return staging

    def _return(self, staging: Staging) -> None:
        with self._lock:
            self._spare.setdefault(len(staging.buffer), deque()).append(staging)
            self._returned.notify()
