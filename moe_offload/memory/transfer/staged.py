"""Rows into the memory of a device that has its own: staged through pinned host memory, copied on a stream beside.

    store ──reader threads──> staging (pinned) ──copy stream──> slot        rows on disk, or converted
    rows in pinned RAM        ─────────────────────copy stream──> slot      demanded: no staging, no thread
    rows in pinned RAM ──reader threads, piece by piece── stream of its own ──> slot      in the background

Two orders hold, and neither makes the host wait: a copy into a slot begins after the last kernel that read the slot
(`mark`, taken when it is asked for, or all rows of `together` are), and kernels launched after `wait` after the copy.

A copy that was launched cannot be taken back. So what nobody has asked for is launched a piece at a time, by threads
that wait for it, and not while a demanded row is being copied: it takes the link when that is idle.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import ExpertReadError, OffloadError
from ..buffers import map_pages
from ..stores import Store
from ..stores.host import HostStore
from ..stores.row_read import RowRead
from .streams import Streams
from .threads import THREADS, TIMEOUT_S, ThreadTransfer
from .ticket import Ticket
from .together import DeviceTicket, Waiting, all_known

STAGING_ROWS = 8  # in flight: two for every reader thread
PIECE_BYTES = 2 << 20  # of a row copied in the background: 40 us of a PCIe 5 link, which a demanded row may wait
PIECES = 2  # on their way in the background at once: one is copied while the next is launched


@dataclass
class Staging:
    """One pinned buffer, and the end of the last copy out of it."""

    buffer: Tensor
    last: Any = None


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
        self._pieces = threading.BoundedSemaphore(PIECES)
        self._together: Waiting | None = None
        self._last_demanded: Any = None  # the end of the last copy of a demanded row
        self._stalls: dict[int, deque[tuple[Any, Any]]] = {}  # layer -> begin and end of waits of the device

    def start(self, store: Store, layer: int, expert: int, row: Any, demanded: bool = True) -> Ticket:
        self._check_open()
        row = row if isinstance(row, Tensor) else torch.frombuffer(row, dtype=torch.uint8)
        row_bytes = len(row)
        if isinstance(store, HostStore):
            source = store.rows_EN(layer)[expert]
            if not demanded:
                return self._start_behind(layer, expert, source, row, self.streams.mark())
            ticket = DeviceTicket(layer, expert, RowRead([], lambda: row_bytes), row_bytes, demanded)
            if self._together is not None and layer in store.pinned:
                self._together.add(ticket, row, source)
                return ticket
            self._copy_demanded(ticket, row, source, self.streams.mark())
            ticket.nbytes = row_bytes
            ticket.done.set()
            return ticket
        after, staging = self.streams.mark(), self._take(row_bytes)
        try:
            read = store.begin(layer, expert, memoryview(staging.buffer.numpy()))
        except BaseException:
            self._return(staging)
            raise

        def finish() -> int:
            nbytes = read.finish()
            self._check_open()  # a read that ended after `close`: its slot may have been given to another row by now
            if ticket.demanded:
                staging.last = self._copy_demanded(ticket, row, staging.buffer, after)
            else:
                staging.last = self.streams.copy(row, staging.buffer, after, background=True)
                ticket.copies.append(staging.last)
            return nbytes

        ticket = DeviceTicket(layer, expert, RowRead(read.parts, finish), row_bytes, demanded)
        ticket.staging = staging
        self._queue(ticket)
        return ticket

    def _start_behind(self, layer: int, expert: int, source: Tensor, row: Tensor, after: Any) -> Ticket:
        """Begin to copy a row that nobody has asked for. Once it is hurried, the rest of it is launched at once."""

        def copy(target: Tensor, piece: Tensor) -> None:
            last = self._last_demanded
            while last is not None and not ticket.demanded and not self.streams.ended(last):
                self.streams.finish(last)
                last = self._last_demanded
            self._check_open()  # its slot may have been given to another row by now
            if ticket.demanded:
                self._copy_demanded(ticket, target, piece, after)
            else:
                with self._pieces:
                    self.streams.finish(self.streams.copy(target, piece, after, background=True))

        pieces = zip(row.split(PIECE_BYTES), source.split(PIECE_BYTES), strict=True)
        read = RowRead([partial(copy, *piece) for piece in pieces], lambda: len(row))
        ticket = DeviceTicket(layer, expert, read, len(row), demanded=False)
        self._queue(ticket)
        return ticket

    @contextlib.contextmanager
    def together(self, most: int) -> Iterator[None]:
        self._together = waiting = Waiting()
        try:
            with waiting.launched_or_failed():
                yield
                for part in waiting.parts(most):
                    self._last_demanded = part.launch(self.streams)
        finally:
            self._together = None

    def _copy_demanded(self, ticket: DeviceTicket, row: Tensor, source: Tensor, after: Any) -> Any:
        with all_known(self.streams):
            copied = self._last_demanded = self.streams.copy(row, source, after)
            ticket.copies.append(copied)
        return copied

    def wait(self, ticket: Ticket) -> int:
        nbytes = super().wait(ticket)
        if not isinstance(ticket, DeviceTicket):
            raise TypeError(f"{ticket.name}: its ticket is of another transfer")
        if self.arrived(ticket):
            self._order(ticket)
        else:
            begin = self.streams.moment()
            self._order(ticket)
            self._stalls.setdefault(ticket.layer, deque()).append((begin, self.streams.moment()))
        return nbytes

    def _order(self, ticket: DeviceTicket) -> None:
        for copied in ticket.copies:
            self.streams.order(copied)

    def arrived(self, ticket: Ticket) -> bool:
        copies = ticket.copies if isinstance(ticket, DeviceTicket) else []
        return super().arrived(ticket) and all(map(self.streams.ended, copies))

    def stalled_s(self, layer: int) -> float:
        """Seconds that the device has waited for rows of `layer`, as far as it is known by now, and not told yet."""
        waits, total_s = self._stalls.get(layer, ()), 0.0
        while waits and (waited_s := self.streams.seconds(*waits[0])) is not None:
            waits.popleft()
            total_s += waited_s
        return total_s

    def send(self, values: Tensor) -> Tensor:
        return self.streams.send(values)

    def hurry(self, ticket: Ticket) -> None:
        ticket.demanded = True  # first: threads that have taken up its pieces look at it
        super().hurry(ticket)

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        """As in `Transfer`. A copy that was launched already is not dropped: later launches begin after it, as for
        `wait`."""
        tickets = list(tickets)
        try:
            super().cancel(tickets)
        finally:  # after Ctrl-C, too
            for ticket in tickets if self._here() else ():
                if isinstance(ticket, DeviceTicket):
                    self._order(ticket)

    def current(self) -> AbstractContextManager[object]:
        return self.streams.in_turn() if self._here() else contextlib.nullcontext()  # CUDA does not survive a fork

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
                made = Staging(map_pages(row_bytes))
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
