"""`Keeper`, the thread that writes usage to files: every few minutes, when a model ends, and when the process does.

The models of a process share one thread for it. A model that is collected only puts its usage into a queue for that
thread, because the collector may run in the middle of anything, and nothing but `SimpleQueue.put` is safe there.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue

from ..cache.counters import LayerCounters
from ..errors import ProfileError
from .profile import Profile, merge_profiles
from .usage import UsageFile

logger = logging.getLogger("moe_offload")

EVERY_S = 180.0

ReadCounters = Callable[[], Sequence[LayerCounters]]


class Usage:
    """What one model has used and its file does not have yet, by workload.

    Args:
        file: Where it is remembered, under the name of the workload at hand.
        counters: What every layer has counted so far. It must not keep the model alive.
    """

    def __init__(self, file: UsageFile, counters: ReadCounters):
        self.file, self._counters = file, counters
        self._seen = [layer.snapshot() for layer in counters()]
        self._unwritten: dict[str, Profile] = {}  # by workload
        self._lock, self._pid, self._complained = threading.Lock(), os.getpid(), False

    def turn_to(self, workload: str) -> None:
        """What is used from now on belongs to `workload`."""
        with self._lock:
            self._collect({})
            self.file = replace(self.file, workload=workload)

    def write(self, **meta: str) -> None:
        """Mix what is new into the files. What cannot be written is said once, kept, and tried again later.

        Nothing in a process that was forked from the model's: both would write the same uses.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._collect(meta)
            for workload, used in list(self._unwritten.items()):
                try:
                    replace(self.file, workload=workload).add(used)
                    del self._unwritten[workload]
                except ProfileError as error:
                    if not self._complained:
                        logger.warning("usage is not remembered: %s. profile='off' ends the attempts", error)
                    self._complained = True

    def _collect(self, meta: dict[str, str]) -> None:
        now = [layer.snapshot() for layer in self._counters()]
        new = [_since(before, layer) for before, layer in zip(self._seen, now, strict=True)]
        self._seen = now
        if not (meta or any(layer.tokens for layer in new)):
            return
        found = Profile.of_layers(self.file.fingerprint, new, meta)
        before = self._unwritten.get(self.file.workload)
        if before is not None:
            found = merge_profiles([before, found]).model_copy(update={"meta": {**before.meta, **meta}})
        self._unwritten[self.file.workload] = found


def _since(before: LayerCounters, now: LayerCounters) -> LayerCounters:
    """What one layer has counted in between: each layer for itself, for a forward may be half way through them."""
    counts = [later - earlier for earlier, later in zip(before.counts, now.counts, strict=True)]
    return LayerCounters(tokens=now.tokens - before.tokens, counts=counts)


class Keeper:
    """Writes the usage of the models of this process."""

    def __init__(self) -> None:
        self._live: set[Usage] = set()
        self._ended: SimpleQueue[Usage] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def keep(self, usage: Usage) -> None:
        """Write `usage` now and then, and at the end of the process."""
        self._live.add(usage)
        if self._thread is None or not self._thread.is_alive():  # a forked process has none of its parent's threads
            self._thread = threading.Thread(target=self._run, name="moe_offload_usage", daemon=True)
            self._thread.start()

    def end(self, usage: Usage) -> None:
        """The model of `usage` is gone: write it once more, from a thread that may."""
        self._ended.put(usage)

    def write_all(self) -> None:
        for usage in list(self._live):
            usage.write()

    def _run(self) -> None:
        while True:
            try:
                usage = self._ended.get(timeout=EVERY_S)
            except Empty:
                self.write_all()
            else:
                usage.write()
                self._live.discard(usage)


KEEPER = Keeper()
atexit.register(KEEPER.write_all)
