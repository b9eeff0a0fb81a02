"""Rows on their way to one layer: asked for, waited for, committed; or given back whole when anything fails.

    awaited    by the event in hand (or pre-warming), and taken in the order they were asked for
    held       read ahead into scratch by the layer before, claimed by the event in hand
    guessed    on their way into slots because a guess named them; nobody waits for them before an event asks

This file is the only one that turns a cache's `Load` into bytes in a slot. A slot whose load has not been committed is
never read, so whatever happens here changes when weights arrive, never which.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ..cache.layer_cache import LayerCache, Load
from ..experts import MoELayer
from ..memory.buffers import POISON, Rows
from ..memory.finite import refuse_infinite
from ..memory.scratch import Held, Scratch
from ..memory.stores import Store
from ..memory.transfer import Ticket, Transfer

PARTS = 4  # of the scratch rows: one is computed while the others load. With two, the link waits for the first one


@dataclass(frozen=True)
class Arrival:
    """A row on its way: into the slot of `load`, or to be used from row `scratch_row` of scratch (-1: none).

    With both it was read ahead into scratch, and goes on to the slot from there.
    """

    expert: int
    load: Load | None
    scratch_row: int
    ticket: Ticket


class Arrivals:
    """What is on its way to the slots and scratch rows of one layer."""

    def __init__(
        self,
        moe: MoELayer,
        cache: LayerCache,
        slots: Rows,
        scratch: Scratch,
        store: Store,
        transfer: Transfer,
        poison: bool = False,
    ):
        self.moe, self.cache, self.store, self.transfer, self.poison = moe, cache, store, transfer, poison
        self.slots, self.scratch, self.scratch_rows = slots, scratch, scratch.rows(moe.layout)
        self.group_rows = max(1, len(self.scratch_rows.rows) // PARTS)  # as many are computed at once, where groups are
        self.awaited: deque[Arrival] = deque()
        self.held: dict[int, Held] = {}
        self.guessed: dict[int, Arrival] = {}

    # One event: begin, look the cache up, claim, start what is missing, take what arrives.

    def begin(self, used: Collection[int]) -> None:
        """Begin an event of the experts `used`: claim rows read ahead for it, and give up loads whose slots it needs.

        Whoever calls it calls `abort` after any error, also one that comes when this has returned.
        """
        if self.awaited or self.held or len(self.cache.pending) > len(self.guessed):
            self.abort()  # an event that was interrupted before its wait left loads behind; a new one starts clean
        begun = time.perf_counter()
        self.held = self.scratch.claim(self.moe.index, used) if self.scratch.ahead else {}
        self._settle_guesses(used)
        self._waited(begun, rows=0)

    def claim_guesses(self, used: Collection[int]) -> None:
        """What was guessed and is `used` is demanded now, first of all. Call it after the cache was looked up."""
        for e in [e for e in self.guessed if e in used]:
            arrival = self.guessed[e]
            self.cache.counters.ahead += 1
            if arrival.load is not None and self.transfer.arrived(arrival.ticket) and arrival.ticket.error is None:
                self.cache.commit(arrival.load, self.transfer.wait(arrival.ticket))
            else:
                self.cache.counters.late += 1
                self.transfer.hurry(arrival.ticket)
                self.awaited.append(arrival)
            del self.guessed[e]  # only now: after an error before, it would be in no list

    def start(self, loads: Iterable[Load], demanded: bool = True) -> None:
        try:
            with self.transfer.together(self.group_rows):
                for load in loads:
                    self.send(load.expert, load, demanded=demanded)
        except BaseException:
            self.abort()
            raise

    def send(self, expert: int, load: Load | None, scratch_row: int = -1, demanded: bool = True) -> None:
        held = self.held.pop(expert, None)
        if held is not None:
            self.cache.counters.ahead += 1
            self.cache.counters.late += not self.transfer.arrived(held.ticket)
            self.awaited.append(Arrival(expert, load, held.scratch_row, held.ticket))
            return
        self.awaited.append(Arrival(expert, load, scratch_row, self._read(expert, load, scratch_row, demanded)))

    def scratch_first(self) -> int:
        """Let what was read ahead be taken before the rest, first what goes on to a slot; return how many those are."""
        self.awaited = deque(sorted(self.awaited, key=lambda one: (one.scratch_row < 0, one.load is None)))
        return sum(one.scratch_row >= 0 for one in self.awaited)

    def take(self, demanded: bool = True) -> Arrival:
        """The next row, in the order they were asked for, once it is complete and, if it has a slot, resident.

        `demanded`: an event asked for it; else it is pre-warming.
        """
        begun = time.perf_counter()
        try:
            arrival = self.awaited[0]
            nbytes = self.transfer.wait(arrival.ticket)
            if self.moe.must_be_finite:
                self._refuse_infinite(arrival)
            self.awaited.popleft()
            if arrival.load is not None:
                if arrival.scratch_row >= 0:
                    row = self.scratch_rows.bytes[arrival.scratch_row]
                    self.slots.unversioned[arrival.load.slot].copy_(row)
                self.cache.commit(arrival.load, nbytes, demanded)
            else:
                self.cache.count_miss(nbytes)
                self.cache.counters.streamed += 1
            return arrival
        except BaseException:
            self.abort()
            raise
        finally:
            if demanded:  # nothing computes while slots are pre-warmed, so nothing waits
                self._waited(begun, rows=1)

    def take_all(self, demanded: bool = True) -> None:
        """Every row that was asked for, complete and, if it has a slot, resident."""
        while self.awaited:
            self.take(demanded)

    @property
    def under_way(self) -> bool:
        """Whether anything is, or was when an event was interrupted."""
        return bool(self.awaited or self.held or self.guessed or self.cache.pending)

    def abort_interrupted(self) -> None:
        """Give up what an event has left behind that was interrupted before its wait, if there was one."""
        if self.under_way:
            self.abort()

    def abort(self) -> None:
        """Give back the slot of every load that has not been committed, once nothing writes there any more.

        The rows of other layers are cancelled too: an interrupted `start` may have queued a ticket that no layer has
        noted, so only cancelling all tickets is sure to end it.
        """
        known: list[Arrival | Held] = [*self.awaited, *self.guessed.values(), *self.held.values()]
        try:
            self.transfer.cancel([*(one.ticket for one in known), *self.transfer.under_way()])
            self.scratch.drop()
        finally:
            self.awaited, self.held, self.guessed = deque(), {}, {}
            loads = list(self.cache.pending.values())
            self.cache.abort_all()
            for load in loads:
                self._poison(load)

    # Before anything has been asked for.

    def start_prewarm(self, expert: int) -> bool:
        """Begin to load `expert` into a free slot; say whether there is anything to wait for (`take`)."""
        loads = self.cache.fill_free_slots([expert])
        self.start(loads, demanded=False)
        return bool(loads)

    def guess(self, experts: Sequence[int]) -> None:
        """Begin to load what is missing of `experts` in the background, into the coldest slots.

        As many slots as there are `experts` are left to the event that is going on.
        """
        self.read_ahead(self.cache.guess(experts, self.cache.slots - len(experts) - len(self.guessed)))

    def read_ahead(self, loads: Iterable[Load]) -> None:
        """Begin to read in the background what nobody has asked for."""
        try:
            for load in loads:
                ticket = self._read(load.expert, load, -1, demanded=False)
                self.guessed[load.expert] = Arrival(load.expert, load, -1, ticket)
        except BaseException:  # the loads that were not started are in no list either
            self.abort()
            raise

    def _settle_guesses(self, used: Collection[int]) -> None:
        """Commit the guesses that are here and not `used`; give up those that failed, or take room that is needed.

        One that is still being read, and whose slot is not needed, goes on: stopping it would mean waiting for it.
        """
        room = self.cache.slots - len(set(used) | set(self.guessed))
        for e, arrival in list(self.guessed.items()):
            load, ticket = arrival.load, arrival.ticket
            if load is None:
                raise AssertionError("a guess has a slot")
            done = self.transfer.arrived(ticket)
            if done and ticket.error is None:
                if e not in used:
                    del self.guessed[e]
                    self.count_wasted(self.transfer.wait(ticket))
                    self.cache.commit(load, 0, demanded=False)
            elif done or (e not in used and (room < 0 or not ticket.begun)):
                self.transfer.cancel([ticket])
                del self.guessed[e]
                self._give_back(load)
                self.count_wasted(ticket.moved)

    def count_wasted(self, nbytes: int) -> None:
        self.cache.counters.wasted_bytes += nbytes

    def _waited(self, begun_s: float, rows: int) -> None:
        ended_s = time.perf_counter()
        self.cache.counters.stall_s += ended_s - begun_s + self.transfer.stalled_s(self.moe.index)
        if self.transfer.timeline is not None:
            self.transfer.timeline.wait(self.moe.index, rows, begun_s, ended_s)

    def _read(self, expert: int, load: Load | None, scratch_row: int, demanded: bool) -> Ticket:
        rows, i = (self.slots, load.slot) if load is not None else (self.scratch_rows, scratch_row)
        if self.poison:
            rows.unversioned[i].fill_(POISON)
        return self.transfer.start(self.store, self.moe.index, expert, rows.rows[i], demanded)

    def _refuse_infinite(self, arrival: Arrival) -> None:
        if arrival.load is not None and arrival.scratch_row < 0:
            row = self.slots.bytes[arrival.load.slot]
        else:
            row = self.scratch_rows.bytes[arrival.scratch_row]
        refuse_infinite(self.moe, arrival.expert, row)

    def _give_back(self, load: Load) -> None:
        self.cache.abort(load)
        self._poison(load)

    def _poison(self, load: Load) -> None:
        if self.poison:
            self.slots.unversioned[load.slot].fill_(POISON)
