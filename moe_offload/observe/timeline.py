"""What happened when, while a model runs: forwards, waits for rows, reads, queues. Bounded; `chrome_trace` draws it.

    forward   from the call of the model to its result
    wait      compute stood still until rows were there: what `stall_s` adds up
    read      a reader thread was busy with a row, or with a part of one
    depth     rows queued and bytes under way, after every change
    cache     after every forward: hit rate of the last few, rows resident

Times are those of `time.perf_counter`, in seconds; `begun_ns` ties them to the clock of the day, which is what
torch.profiler goes by.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..cache.layer_cache import LayerCache

logger = logging.getLogger("moe_offload")

MAX_EVENTS = 200_000  # some 50 MB; a timeline of more is slow to look at
LAST = 16  # forwards that a hit rate is of
SHORT_S = 10e-6  # a shorter wait is not recorded: it is the time it takes to see that the row is there


class Forward(NamedTuple):
    """One call of the model, with `tokens` tokens of each of `sequences` sequences; whether it decoded."""

    begun_s: float
    ended_s: float
    sequences: int
    tokens: int
    decode: bool


@dataclass(slots=True)
class Wait:
    """Compute waited for `rows` rows; for 0, it waited until rows that were read ahead had been given up."""

    begun_s: float
    ended_s: float
    layer: int
    rows: int


@dataclass(slots=True)
class ReadSpan:
    """One part of a row, read by `thread`. `nbytes` stays 0 for a row that never became complete."""

    thread: str
    begun_s: float
    ended_s: float
    layer: int
    expert: int
    demanded: bool
    error: str
    nbytes: int = 0


class Depth(NamedTuple):
    """What a transfer has to do: rows in its two queues, threads that read, `nbytes` of all these rows."""

    demanded: int
    background: int
    reading: int
    nbytes: int


class CacheState(NamedTuple):
    """The caches after a forward; `hit_rate` is None where nothing was asked for."""

    at_s: float
    hit_rate: float | None
    resident: int


class Timeline:
    """Events of the layers whose caches these are. After `max_events` it stops, and says so once.

    Reader threads and the one that computes add to it at once.
    """

    def __init__(self, caches: Sequence[LayerCache], max_events: int = MAX_EVENTS):
        self.begun_s, self.begun_ns = time.perf_counter(), time.time_ns()
        self.caches, self.left = list(caches), max_events
        self.forwards: list[Forward] = []
        self.waits: list[Wait] = []
        self.reads: list[ReadSpan] = []
        self.depths: list[tuple[float, Depth]] = []
        self.states: list[CacheState] = []
        self._totals: deque[tuple[int, int]] = deque([self._hits_and_misses()], maxlen=LAST + 1)
        self._lock = threading.Lock()

    def forward(self, begun_s: float, sequences: int, tokens: int, decode: bool) -> None:
        """A forward has ended, however it did."""
        if self._room(2):
            now_s = time.perf_counter()
            self.forwards.append(Forward(begun_s, now_s, sequences, tokens, decode))
            self._totals.append(self._hits_and_misses())
            hits, misses = (new - old for new, old in zip(self._totals[-1], self._totals[0], strict=True))
            resident = sum(cache.slots - len(cache.free) - len(cache.pending) for cache in self.caches)
            self.states.append(CacheState(now_s, hits / (hits + misses) if hits + misses else None, resident))

    def wait(self, layer: int, rows: int, begun_s: float, ended_s: float) -> None:
        last = self.waits[-1] if self.waits else None
        if last is not None and last.layer == layer and begun_s - last.ended_s < SHORT_S:
            last.ended_s, last.rows = ended_s, last.rows + rows  # nothing was computed in between
        elif ended_s - begun_s >= SHORT_S and self._room():
            self.waits.append(Wait(begun_s, ended_s, layer, rows))

    def read(
        self, layer: int, expert: int, demanded: bool, begun_s: float, error: BaseException | None
    ) -> list[ReadSpan]:
        """The calling thread is done with a part of this row. Returns what was written down of it: one, or none."""
        if not self._room():
            return []
        thread, why = threading.current_thread().name, "" if error is None else type(error).__name__
        begun_s = max(begun_s, self.begun_s)
        read = ReadSpan(thread, begun_s, time.perf_counter(), layer, expert, demanded, why)
        self.reads.append(read)
        return [read]

    def arrived(self, reads: Sequence[ReadSpan], nbytes: int) -> None:
        """All of a row, whose parts these are, has been read: `nbytes`, shared out among them."""
        for i, read in enumerate(reads):
            read.nbytes = nbytes * (i + 1) // len(reads) - nbytes * i // len(reads)

    def depth(self, depth: Depth) -> None:
        if self._room():
            self.depths.append((time.perf_counter(), depth))

    def _room(self, events: int = 1) -> bool:
        with self._lock:
            full = self.left < events
            said = self.left < 0
            self.left = -1 if full else self.left - events
        if full and not said:
            logger.warning("the timeline is full: what happens from here on is not recorded; start_timeline() again")
        return not full

    def _hits_and_misses(self) -> tuple[int, int]:
        counters = [cache.counters for cache in self.caches]
        return sum(c.hits for c in counters), sum(c.misses for c in counters)
