"""`Watch`: which ranks are still there.

A collective that waits for a rank cannot be interrupted from Python. A rank that was killed closes its connections, and
the others get an error at once; who it was, they find here. A rank that stops without closing them (SIGSTOP, a machine
that loses its network) is missed by this thread, which then ends the process, as NCCL's watchdog does.

    <prefix>/beat/<rank>   a number that grows while the rank's process runs
    <prefix>/end/<rank>    why it ended, in its own words, and because of which rank
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing.util
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import RankError
from .names import RankName
from .store import EVERY_S, Answers

#: Looks without a new beat after which a rank counts as lost. Looks and not seconds: a laptop that was asleep, and a
#: job that was stopped as a whole, have missed none. Fewer would miss beats of a rank that swaps or compiles.
PATIENCE = 15
GRACE_S = 3.0  # for a call to end by itself once a rank is lost, and for all to see which rank was the first
ENDS_S = 8.0  # for a call to end once a rank has: its connections are closed, so the next exchange fails
LINGER_S = 10.0  # for the others to end, once the rank that holds the store has
FIND_S = 20.0  # to find out who closed a connection: a process on another machine is missed after PATIENCE looks


class Watch:
    """Beats for this rank, and looks for the beats of the others, until the process ends.

    `holder` is the rank that holds the store in which all met; None where the launcher does.
    """

    def __init__(self, store: Answers, prefix: str, names: Sequence[RankName], rank: int, holder: int | None):
        self.names, self.rank, self._holder = names, rank, holder
        self._store, self._asking, self._prefix = store, store.another(), prefix
        self._calls = 0  # of a model, that are under way
        self._silent = [0] * len(names)
        self._unheard = False  # the store itself does not answer
        self._ended = self._blamed = False
        self._found: tuple[int | None, str] | None = None  # who ended first (None: the launcher), and how
        self._stop = threading.Event()
        self._beat(0)
        threading.Thread(target=self._run, name="moe_offload_ranks", daemon=True).start()
        # As atexit, which the processes that multiprocessing starts do not run.
        multiprocessing.util.Finalize(None, self.stop, exitpriority=0)

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """While it is entered, this process waits for others, and ends with one that is lost."""
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    def tell_end(self, why: str, because: int | None = None) -> None:
        """Let the others know that this rank takes no further part: `why`, and because of which rank."""
        if not self._ended:
            self._ended = True
            told = {"why": why[:500], "because": self.rank if because is None else because}
            with contextlib.suppress(Exception):  # the store may be what is gone
                self._asking.set(f"{self._prefix}/end/{self.rank}", json.dumps(told))

    def check(self) -> None:
        """Raise `RankError` if a rank is known to have ended."""
        found = self.find_ended()
        if found is not None:
            raise self.error(*found)

    def find_ended(self, within_s: float = 0.0) -> tuple[int | None, str] | None:
        """The rank that ended first, as far as is known, and how; waits up to `within_s` for it to be known."""
        ends_s = time.monotonic() + within_s
        while self._found is None:
            self._found = self._look()
            if time.monotonic() >= ends_s:
                break
            time.sleep(0.05)
        return self._found

    def error(self, rank: int | None, how: str) -> RankError:
        self._blamed = True
        who = "the launcher (torchrun)" if rank is None else str(self.names[rank])
        return RankError(
            f"{who} {how}, and rank {self.rank} cannot go on without it. What it said itself is in its "
            "own output; start all ranks anew"
        )

    def _look(self) -> tuple[int | None, str] | None:
        told = self._told()
        for rank, end in told.items():
            if end["because"] == rank:
                return rank, f"has ended: {end['why']}"
        for name in self.names:
            if name.rank not in told and name.rank != self.rank and name.has_ended():
                return name.rank, "was killed, or has ended without a word"
        for end in told.values():
            return end["because"], "has ended, or does not answer, other ranks say"
        for name in self.names:
            if self._silent[name.rank] >= PATIENCE:
                return name.rank, f"has not been heard of for {PATIENCE * EVERY_S:.0f} s"
        if (self._unheard or self._store.silent) and self.rank != self._holder:
            return self._holder, "does not answer; it holds the store in which the ranks met"
        return None

    def _told(self) -> dict[int, dict[str, Any]]:
        """What ranks have said about their end."""
        told: dict[int, dict[str, Any]] = {}
        with contextlib.suppress(Exception):
            for name in self.names:
                said = None if name.rank == self.rank else self._asking.get(f"{self._prefix}/end/{name.rank}")
                if said is not None:
                    told[name.rank] = json.loads(said)
        return told

    def _beat(self, n: int) -> None:
        self._store.set(f"{self._prefix}/beat/{self.rank}", str(n))

    def _run(self) -> None:
        heard: list[bytes | None] = [None] * len(self.names)
        n = failed = 0
        while not self._stop.wait(EVERY_S):
            n += 1
            try:
                self._beat(n)
                for name in self.names:
                    found = self._store.get(f"{self._prefix}/beat/{name.rank}")
                    self._silent[name.rank] = self._silent[name.rank] + 1 if found == heard[name.rank] else 0
                    heard[name.rank] = found
                failed = 0
            except Exception:  # whatever a store raises: what counts is that it does not answer
                failed += 1
                self._unheard = failed >= 3 or self._store.silent
            self._found = self._found or self._look()  # now, before others end because of it
            if self._unheard or max(self._silent) >= PATIENCE:
                self._end_call(GRACE_S)
            elif self._found is not None and self._calls:
                self._end_call(ENDS_S)

    def _end_call(self, grace_s: float) -> None:
        """A rank is lost: end the process, if it is in a call that does not end by itself."""
        time.sleep(grace_s)
        found = self.find_ended()
        if self._calls and found is not None and not self._stop.is_set():
            error = self.error(*found)
            self.tell_end(str(error), because=found[0])
            print(f"moe_offload: {error}", file=sys.__stderr__, flush=True)  # a rank may be told to write nothing
            os._exit(1)

    def stop(self) -> None:
        """Beat no more: the program is over, or another group has taken this one's place.

        A rank that ends because of another stays for a moment: whoever looks for the first to end must not find the
        second. One that holds the store stays until the others have ended, which may be reading from it.
        """
        if self._stop.is_set():
            return
        because = self._found[0] if self._found is not None and self._blamed else None
        self.tell_end("its program is over", because=because)
        if because is not None:
            time.sleep(GRACE_S)
        ends_s = time.monotonic() + LINGER_S
        while self.rank == self._holder and not self._alone() and time.monotonic() < ends_s:
            time.sleep(0.05)
        self._stop.set()

    def _alone(self) -> bool:
        told = self._told()
        gone = {*told, self.rank, *(rank for rank, looks in enumerate(self._silent) if looks >= PATIENCE)}
        return all(name.rank in gone or name.has_ended() for name in self.names)
