"""Rows into the memory of a device that has its own: staged through pinned host memory, copied on a stream beside.

    store ──reader threads──> staging (pinned) ──copy stream──> slot        rows on disk, or converted
    rows in pinned RAM        ─────────────────────copy stream──> slot      no staging, no thread

Two orders hold, and neither makes the host wait: a copy into a slot begins after the last kernel that read the slot
(`mark`, taken when the row is asked for), and kernels that are launched after `wait` begin after the copy.
`CudaStreams` is the only class here that knows CUDA; tests put a slow one in its place.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import ExpertReadError, OffloadError
from ..buffers import page_aligned
from ..stores import Store
from ..stores.host import HostStore
from ..stores.row_read import RowRead
from . import pinned
from .threads import THREADS, TIMEOUT_S, ThreadTransfer
from .ticket import Ticket

logger = logging.getLogger("moe_offload")

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

    def send(self, values: Tensor) -> Tensor:
        """`values`, of the host, on the device, for what is launched from now on. The host does not wait."""

    def order(self, event: Any) -> None:
        """What is launched on the compute stream from now on begins after `event`. The host does not wait."""

    def finish(self, event: Any) -> None:
        """The host waits for `event`."""

    def drain(self) -> None:
        """The host waits for all copies."""

    def current(self) -> AbstractContextManager[object]:
        """While it is entered, this thread launches on this device."""

    def capturing(self) -> bool:
        """Whether what is launched on the compute stream is recorded into a graph instead of run."""


class CudaStreams:
    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._warned = False

    def pin(self, buffer: Tensor) -> None:
        with self.current():  # to register memory is to start CUDA on the current device
            error = pinned.pin(buffer.view(1, -1))
        if error and not self._warned:
            self._warned = True
            logger.warning("CUDA could not pin the memory that rows are staged in (%s): they are copied slowly", error)

    def unpin(self, buffer: Tensor) -> None:
        with self.current():
            pinned.unpin(buffer.view(1, -1))

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        with self.current(), torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self.stream)
        return done

    def send(self, values: Tensor) -> Tensor:
        return values.pin_memory().to(self.device, non_blocking=True)

    def order(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def drain(self) -> None:
        self.stream.synchronize()

    def current(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()


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

    runs_ahead = True

    def __init__(self, streams: Streams, staging_rows: int = STAGING_ROWS, reader_threads: int = THREADS):
        super().__init__(reader_threads)
        self.streams, self._most = streams, staging_rows
        self._spare: dict[int, deque[Staging]] = {}  # row bytes -> buffers that no thread fills
        self._made: dict[int, int] = {}
        self._all: list[Staging] = []
        self._returned = threading.Condition(self._lock)

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
            self._check_open()  # a read that outlasted `close`: its slot may be somebody else's by now
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

    def send(self, values: Tensor) -> Tensor:
        return self.streams.send(values)

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        """A copy that has been launched ends before whatever is launched from now on, as for `wait`."""
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
