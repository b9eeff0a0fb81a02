"""Rows into the memory of a device that has its own: staged through pinned host memory, copied on a stream beside.

    store ──reader threads──> staging (pinned) ──copy stream──> slot        rows on disk, or converted
    rows in pinned RAM        ─────────────────────copy stream──> slot      no staging, no thread

Two orders hold, and neither makes the host wait: a copy into a slot begins after the last kernel that read the slot
(`mark`, taken when the row is asked for), and kernels that are launched after `wait` begin after the copy.
`CudaStreams` is the only class here that knows CUDA; tests put a slow one in its place.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .buffers import page_aligned
from .errors import ExpertReadError
from .kernels import pinned
from .stores import Store
from .stores.host import HostStore
from .stores.request import RowRead
from .transfer import TIMEOUT_S, ThreadTransfer, Ticket

STAGING_ROWS = 8  # in flight: two for every reader thread


class Streams(Protocol):
    """The streams of one device. An event is whatever `mark` and `copy` return."""

    def pin(self, buffer: Tensor) -> None:
        """Let the device read this page-aligned host memory by itself, if that is possible."""

    def unpin(self, buffer: Tensor) -> None:
        """Undo `pin`, before the memory is given back."""

    def mark(self) -> Any:
        """The moment when all that has been launched on the compute stream so far is done."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copy on the stream beside, not before `after`; the event is its end. May be called by any thread."""

    def order(self, event: Any) -> None:
        """What is launched on the compute stream from now on begins after `event`. The host does not wait."""

    def finish(self, event: Any) -> None:
        """The host waits for `event`."""

    def drain(self) -> None:
        """The host waits for all copies."""


class CudaStreams:
    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def pin(self, buffer: Tensor) -> None:
        pinned.pin([buffer.view(1, -1)])

    def unpin(self, buffer: Tensor) -> None:
        pinned.unpin([buffer.view(1, -1)])

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self.stream)
        return done

    def order(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def drain(self) -> None:
        self.stream.synchronize()


def cuda_transfer(device: str) -> DeviceTransfer:
    return DeviceTransfer(CudaStreams(torch.device(device)))


def present(untested: bool = True) -> list[str]:
    """The kinds of devices that this process can compute on; without `untested`, those that any version was run on."""
    return ["cpu", "cuda"] if untested and torch.cuda.is_available() else ["cpu"]


def free_bytes(device: str) -> int:
    """Memory of a device that nothing holds yet, what torch keeps for reuse included."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def release_unused(device: str) -> None:
    """Give back what torch keeps for reuse: a block that is to be larger than any that is free needs new memory."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


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

    def __init__(self, streams: Streams, staging_rows: int = STAGING_ROWS):
        super().__init__()
        self.streams, self._most = streams, staging_rows
        self._spare: dict[int, deque[Staging]] = {}  # row bytes -> buffers that no thread fills
        self._made: dict[int, int] = {}
        self._all: list[Staging] = []
        self._returned = threading.Condition()

    def start(self, store: Store, layer: int, expert: int, row: Any, urgent: bool = True) -> Ticket:
        self._check_open()
        row = row if isinstance(row, Tensor) else torch.frombuffer(row, dtype=torch.uint8)
        after, row_bytes = self.streams.mark(), len(row)
        if isinstance(store, HostStore):
            ticket = DeviceTicket(layer, expert, RowRead([], lambda: row_bytes), row_bytes, urgent)
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
            self._check_open()  # a read that outlasted `close`: its slot may be somebody else's when the copy begins
            ticket.copied = staging.last = self.streams.copy(row, staging.buffer, after)
            return nbytes

        ticket = DeviceTicket(layer, expert, RowRead(read.parts, finish), row_bytes, urgent)
        ticket.staging = staging
        self._queue(ticket)
        return ticket

    def wait(self, ticket: Ticket) -> int:
        nbytes = super().wait(ticket)
        if not isinstance(ticket, DeviceTicket):
            raise TypeError(f"{ticket.name}: its ticket is of another transfer")
        self.streams.order(ticket.copied)
        return nbytes

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        tickets = list(tickets)
        super().cancel(tickets)
        for ticket in tickets:
            if isinstance(ticket, DeviceTicket) and ticket.copied is not None:
                self.streams.finish(ticket.copied)  # nothing may write there any more when this returns

    def close(self) -> None:
        if self._closed:
            return
        super().close()
        if os.getpid() == self._pid:  # a forked process has no streams
            try:
                self.streams.drain()
            finally:
                for staging in self._all:
                    self.streams.unpin(staging.buffer)

    def _ended(self, ticket: Ticket) -> None:
        if isinstance(ticket, DeviceTicket) and ticket.staging is not None:  # once: what is done may still be cancelled
            staging, ticket.staging = ticket.staging, None
            self._return(staging)
        super()._ended(ticket)

    def _take(self, row_bytes: int) -> Staging:
        """A buffer whose last copy is over. Waits for one: reader threads give them back without our help."""
        with self._returned:
            free = self._spare.setdefault(row_bytes, deque())
            if not free and self._made.get(row_bytes, 0) < self._most:
                staging = Staging(page_aligned(row_bytes))
                self._all.append(staging)  # first: whatever interrupts the pinning, `close` undoes it
                self.streams.pin(staging.buffer)
                free.append(staging)
                self._made[row_bytes] = self._made.get(row_bytes, 0) + 1
            if not self._returned.wait_for(lambda: free, TIMEOUT_S):
                raise ExpertReadError(
                    f"no staging row of {row_bytes} bytes has come free in {TIMEOUT_S:.0f} s; {self._state()}. The "
                    "disk or mount does not answer; the next call tries again."
                )
            staging = free.popleft()
        if staging.last is not None:
            self.streams.finish(staging.last)
        return staging

    def _return(self, staging: Staging) -> None:
        with self._returned:
            self._spare[len(staging.buffer)].append(staging)
            self._returned.notify()
