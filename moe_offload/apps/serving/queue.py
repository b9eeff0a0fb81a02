"""Who is answered when: one request after the other, or some together, on a thread of its own; those that wait in the
order they came.

A request whose client has left, waiting or running, is dropped: its result could not be delivered. One that runs ends
at its next token.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..together.turn import Turn
from .protocol.failures import RequestError, stopping_error

if TYPE_CHECKING:
    from ..together.turns import Turns

LONGEST_RETRY_S = 60.0


class Job:
    """The work of one request, and what comes of it: `events`, for the task on the event loop that answers it.

    Args:
        work: generates; called with this job on the queue's thread.
        prompt_tokens: for the log.
        seeded: whether it draws random numbers from a seed.
        workload: what its usage is counted for, if not for whatever it is counted at the moment.
    """

    def __init__(
        self, work: Callable[[Job], None], prompt_tokens: int, seeded: bool = False, workload: str | None = None
    ):
        self.seeded, self.workload, self.begun_s = seeded, workload, 0.0
        self.work, self.prompt_tokens, self.generated_tokens = work, prompt_tokens, 0
        self.known_tokens = 0  # of the prompt: those that were not read again
        self.events: asyncio.Queue[Any] = asyncio.Queue()  # pieces with their index, then None or an exception
        self.asked_s, self.first_token_s, self.last_token_s = time.perf_counter(), 0.0, 0.0
        self.left = False  # whether its client has closed the connection
        self._loop, self._gone = asyncio.get_running_loop(), threading.Event()

    def gone(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._gone.is_set()

    def drop(self) -> None:
        self._gone.set()

    def count_token(self) -> None:
        self.generated_tokens, self.last_token_s = self.generated_tokens + 1, time.perf_counter()
        self.first_token_s = self.first_token_s or self.last_token_s

    def tell(self, event: Any) -> None:
        """Hand `event` to the task that answers. From any thread."""
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody waits
            self.drop()


class Queue:
    """Jobs, and the thread that does them.

    Args:
        longest: how many may wait beside those that run.
        together: computes some at once; None: one after the other.
    """

    def __init__(self, longest: int, together: Turns | None = None):
        self.longest, self._together, self._most = longest, together, 1 if together is None else together.most
        self.running: list[Job] = []
        self._waiting: deque[Job] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._usual_s = 1.0  # what a request takes, averaged over the last few
        self._thread = threading.Thread(target=self._run, name="moe_offload_generate", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def put(self, job: Job) -> None:
        """Raises RequestError: 429 where too many wait, 503 once the server stops."""
        with self._changed:
            if self._closed:
                raise stopping_error()
            if len(self._waiting) + len(self.running) >= self.longest + self._most:
                raise RequestError(
                    429,
                    f"{self.longest} requests wait already, which is the most that may; try again later",
                    code="queue_full",
                    retry_s=min(max(self._usual_s / self._most, 1.0), LONGEST_RETRY_S),
                )
            self._waiting.append(job)
            self._changed.notify()

    def drop(self, job: Job) -> None:
        """The client of `job` has left: it is not begun, or ends at its next token. Harmless if it is done."""
        job.left = True
        job.drop()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self) -> None:
        """Tell all that run and wait that the server stops; what runs ends at its next token. Idempotent."""
        with self._changed:
            self._closed = True
            jobs = [*self.running, *self._waiting]
            self._waiting.clear()
            self._changed.notify()
        for job in jobs:
            job.tell(stopping_error())
            job.drop()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end, after `close()`. Returns whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
            if self._together is not None:
                try:
                    self._together.run(self._take_turn)
                except Exception as error:  # of what runs them, not of one of them
                    for one in list(self.running):
                        self._ended(one, error)
            elif (job := self._take()) is not None:
                outcome: Exception | None = None
                try:
                    job.work(job)
                except Exception as error:  # it is the request's, and the server goes on
                    outcome = error
                self._ended(job, outcome)

    def _take(self) -> Job | None:
        """The next job, which runs from now on, if there is one."""
        with self._changed:
            if self._closed or not self._waiting:
                return None
            job = self._waiting.popleft()
            self.running.append(job)
        job.begun_s = time.perf_counter()
        return job

    def _take_turn(self) -> Turn | None:
        job = self._take()
        if job is None:
            return None
        return Turn(partial(job.work, job), partial(self._ended, job), job.seeded, job.workload)

    def _ended(self, job: Job, outcome: Exception | None) -> None:
        with self._changed:  # before its client hears of it and asks for more
            self.running.remove(job)
        job.tell(outcome)
        self._usual_s += 0.2 * (time.perf_counter() - job.begun_s - self._usual_s)
