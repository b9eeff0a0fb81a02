"""The reader threads of a CPU's transfer, and of whatever else stages rows on their way from a store.

Longer than 250 lines: one lock guards queues, threads and tickets, and whoever changes one of them reads all of it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from ...errors import ClosedError, ExpertReadError
from ...observe.timeline import Depth, Timeline
from ..stores import Store
from .ticket import Done, Ticket

logger = logging.getLogger("moe_offload")

THREADS = 4  # reads in flight; on the disks that were measured, more were not faster
GET_GOING_S = 0.002  # `get_going` waits so long for the threads to take up their reads: they then need no core
SLOW_S = 5.0  # a row that takes longer is logged
INTERRUPTS = 1000  # so often may waiting for reads be interrupted before it is given up
TIMEOUT_S = 300.0  # a row that takes longer is an error, so that a disk that hangs does not hang the caller for ever


class ThreadTransfer:
    """A few threads that take parts from two queues. They start with the first row and end with `close`.

    A reader thread holds the GIL only between reads, and no lock while it reads. What it raises, whatever it is, is
    raised by the `wait` for that row. A process forked from this one has no such threads: it gets `ClosedError`.
    """

    runs_ahead = False

    def __init__(self, threads: int = THREADS):
        self.timeline: Timeline | None = None
        self._count = threads
        self._threads: list[threading.Thread] = []
        self._lock = threading.RLock()  # guards all below, and every ticket's counts
        # Take the lock itself: a condition is left in Python code, and Ctrl-C there would leave it locked.
        self._changed = threading.Condition(self._lock)
        self._taken = Done()  # once as many reads are under way as can be; of whoever has asked for that last
        self._demanded: deque[Ticket] = deque()
        self._background: deque[Ticket] = deque()
        self._running: dict[int, tuple[Ticket, float]] = {}  # thread -> the ticket it works for, since when
        self._closed = False
        self._pid = os.getpid()

    def start(self, store: Store, layer: int, expert: int, row: memoryview, demanded: bool = True) -> Ticket:
        self._check_open()
        ticket = Ticket(layer, expert, store.begin(layer, expert, row), len(row), demanded)
        self._queue(ticket)
        return ticket

    def _queue(self, ticket: Ticket) -> None:
        try:
            with self._lock:
                if not self._threads:
                    self._start_threads()
                (self._demanded if ticket.demanded else self._background).append(ticket)
                self._changed.notify(len(ticket.queued))
                self._has_changed()
        except BaseException:  # no thread could be started, or Ctrl-C: the caller never gets this ticket to wait for
            self.cancel([ticket])
            raise

    def together(self, most: int) -> AbstractContextManager[object]:
        return nullcontext()

    def wait(self, ticket: Ticket) -> int:
        begun, warned = time.monotonic(), False
        while not ticket.done.wait(SLOW_S):
            self._check_open()
            waited = time.monotonic() - begun
            if waited > TIMEOUT_S:
                raise ExpertReadError(
                    f"{ticket.name}: its row has not arrived after {waited:.0f} s; {self._state()}. The disk or mount "
                    "does not answer; if it goes on so, load the model again"
                )
            if not warned:
                warned = True
                logger.warning("%s: waited %.0f s for its row; %s", ticket.name, waited, self._state())
        if ticket.error is not None:
            raise ticket.error
        return ticket.nbytes

    def arrived(self, ticket: Ticket) -> bool:
        return ticket.done.is_set()

    def stalled_s(self, layer: int) -> float:
        return 0.0  # a CPU waits in `wait`

    def get_going(self) -> None:
        """Wait until the reader threads have begun.

        Once all cores compute, a thread that wakes up waits some 3 ms for a core (Linux), and the disk idles meanwhile.
        """
        if not self._here():
            return
        with self._lock:
            if not self._demanded or len(self._running) >= self._count:
                return
            self._taken = taken = Done()  # no condition: Ctrl-C in its wait() would give the lock back twice
        taken.wait(GET_GOING_S)

    def send(self, values: Tensor) -> Tensor:
        return values

    def hurry(self, ticket: Ticket) -> None:
        if not self._here():
            return
        with self._lock:
            if ticket in self._background:
                self._background.remove(ticket)
                self._demanded.append(ticket)
                ticket.demanded = True
                self._changed.notify(len(ticket.queued))
                self._has_changed()

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        if not self._here():
            return
        tickets, interrupted = list(tickets), None
        for _ in range(INTERRUPTS):
            try:
                self._drop_and_wait(tickets)
                break
            # Ctrl-C, or what another signal's handler raises: the slots are not ours before the reads have ended.
            except BaseException as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted

    def _drop_and_wait(self, tickets: Sequence[Ticket]) -> None:
        with self._lock:
            for ticket in tickets:
                self._drop(ticket, ClosedError(f"{ticket.name}: cancelled"))
            # Ctrl-C in notify() leaves a waiter behind that nobody waits on, and which the next notify() would wake:
            # the reader that it meant would sleep on. To wake all clears it away.
            self._changed.notify_all()
        for ticket in tickets:
            if not ticket.done.wait(TIMEOUT_S):
                self._refuse_from_now_on()  # what hangs may still write: nothing is ever loaded there again
                return

    def under_way(self) -> list[Ticket]:
        if not self._here():
            return []
        with self._lock:
            return [*self._demanded, *self._background, *(ticket for ticket, _ in self._running.values())]

    def depth(self) -> Depth:
        # Copies, each made in one step of the interpreter, because whoever asks takes no lock.
        demanded, background, running = list(self._demanded), list(self._background), list(self._running.values())
        tickets = {id(ticket): ticket for ticket in (*demanded, *background, *(ticket for ticket, _ in running))}
        nbytes = sum(ticket.row_bytes for ticket in tickets.values())
        return Depth(len(demanded), len(background), len(running), nbytes)

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def refuse_capture(self, name: str) -> None:
        pass  # a CPU runs what it is told

    def close(self) -> None:
        self._refuse_from_now_on()
        threads, self._threads = self._threads if self._here() else [], []
        for thread in threads:
            if thread is not threading.current_thread():  # the model was collected in one of its own
                thread.join(SLOW_S)

    def _refuse_from_now_on(self) -> None:
        if not self._here():
            self._closed = True
            return
        with self._lock:
            self._closed = True
            for ticket in (*self._demanded, *self._background):
                self._drop(ticket, self._is_closed())
            self._changed.notify_all()

    def _start_threads(self) -> None:
        # Daemons: a read that hangs must not keep the interpreter from ending.
        for i in range(self._count):
            thread = threading.Thread(target=self._work, name=f"moe_offload-read-{i}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _work(self) -> None:
        while True:
            with self._lock:
                while not (self._demanded or self._background or self._closed):
                    self._changed.wait()
                queue = self._demanded or self._background
                if not queue:
                    return
                ticket = queue[0]
                part = ticket.queued.popleft()
                if not ticket.queued:
                    queue.popleft()
                self._running[threading.get_ident()] = (ticket, time.perf_counter())
                self._has_changed()
                if not self._demanded or len(self._running) >= self._count:
                    self._taken.set()
            try:
                if ticket.error is None:
                    part()
            except BaseException as error:  # raised again by `wait`, in the forward that needs the row
                ticket.error = ticket.error or error
            self._part_done(ticket)
            del part, ticket  # an idle thread would hold on to the row's memory

    def _part_done(self, ticket: Ticket) -> None:
        with self._lock:
            if ticket.unfinished > 1:
                ticket.unfinished -= 1
                self._free(ticket)  # in one step: who waits for the row must find us idle after it
                return
        try:
            if ticket.error is None:
                ticket.nbytes = ticket.finish()
        except BaseException as error:
            ticket.error = error
        with self._lock:
            ticket.unfinished = 0  # only after `finish`, which writes to the row: at 0 `cancel` gives it to others
            self._free(ticket)
            if self.timeline is not None:
                self.timeline.arrived(ticket.reads, ticket.nbytes)
            self._ended(ticket)

    def _free(self, ticket: Ticket) -> None:
        """The calling thread works for `ticket` no more. The caller holds the lock."""
        _, begun_s = self._running.pop(threading.get_ident())
        if self.timeline is not None:
            ticket.reads += self.timeline.read(ticket.layer, ticket.expert, ticket.demanded, begun_s, ticket.error)
        self._has_changed()

    def _has_changed(self) -> None:
        """Let the timeline record queues and readers, which have changed. The caller holds the lock."""
        if self.timeline is not None:
            self.timeline.depth(self.depth())

    def _drop(self, ticket: Ticket, why: Exception) -> None:
        """Forget the parts that no thread has taken. The caller holds the lock."""
        for queue in (self._demanded, self._background):
            if ticket in queue:
                queue.remove(ticket)
        nothing: deque[Callable[[], None]] = deque()
        count = len(ticket.queued)
        if count:
            ticket.error = ticket.error or why
            ticket.queued = nothing  # first: if Ctrl-C comes now and the ticket is dropped again, parts count once
            ticket.unfinished -= count
            ticket.dropped += count
        self._has_changed()
        if ticket.unfinished == 0:
            self._ended(ticket)

    def _ended(self, ticket: Ticket) -> None:
        """No thread will touch the row of `ticket` any more, however it went. The caller holds the lock."""
        ticket.done.set()

    def _here(self) -> bool:
        """Whether this is the process with the threads. In one forked from it nobody reads, and the lock is not to be
        taken: a thread that is not there may have held it."""
        return os.getpid() == self._pid

    def _check_open(self) -> None:
        if not self._here():
            raise ClosedError(
                "this process was forked from the one that offloaded the model, and the threads that read experts are "
                "not in it; load the model in the process that runs it (for multiprocessing, use the 'spawn' method)"
            )
        if self._closed:
            raise self._is_closed()

    def _is_closed(self) -> ClosedError:
        return ClosedError("this transfer was closed. Offload the model again to go on")

    def _state(self) -> str:
        with self._lock:
            now = time.perf_counter()
            under_way = [f"{ticket.name} for {now - since:.1f} s" for ticket, since in self._running.values()]
            return (
                f"reading: {', '.join(under_way) or 'nothing'}; queued: {len(self._demanded)} demanded rows, "
                f"{len(self._background)} in the background"
            )
