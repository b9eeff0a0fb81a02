"""What goes through the scratch rows during one event: rows that have no slot, and then rows for the next layer.

scratch row 0   ░░░░████░░░░████░░░░        ░ on its way   █ computed
scratch row 1   ░░░░    ████░░░░████░░░░    the last ones on their way are for the next layer
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from ..in_flight import Arrivals

READ_AHEAD_USES = 2  # read ahead for the next layer only if the event has at least so many pairs per expert


class Feed:
    """`without_slot` are the experts of an event of `pairs` pairs that have no slot and are not on their way yet."""

    def __init__(self, arrivals: Arrivals, following: Arrivals | None, pairs: int, without_slot: Sequence[int]):
        self.arrivals, self.following, self.without_slot = arrivals, following, deque(without_slot)
        self._expected = self._expected_next(pairs)

    def claim(self) -> None:
        """Demand those of `without_slot` that were read ahead: they are here, or will be soon."""
        for e in [e for e in self.without_slot if e in self.arrivals.held]:
            self.without_slot.remove(e)
            self.arrivals.send(e, None)

    def fill(self) -> None:
        """Rows without a slot into whatever scratch is free; what is left over reads ahead."""
        arrivals, without_slot = self.arrivals, self.without_slot
        taken = {held.scratch_row for held in arrivals.held.values()} | {one.scratch_row for one in arrivals.awaited}
        free_rows = deque(i for i in range(len(arrivals.scratch_rows.rows)) if i not in taken)
        while free_rows and without_slot:
            arrivals.send(without_slot.popleft(), None, free_rows.popleft())
        for scratch_row in free_rows:
            self._read_ahead(scratch_row)

    def reuse(self, scratch_row: int) -> None:
        """This scratch row has done its part: the next in need takes it."""
        if self.without_slot:
            self.arrivals.send(self.without_slot.popleft(), None, scratch_row)
        else:
            self._read_ahead(scratch_row)

    def _expected_next(self, pairs: int) -> Iterator[int]:
        """Experts that the following layer will probably need and has to read, the likeliest first.

        Only where an event uses most experts of a layer, as a long prompt does: then what is absent there will mostly
        be asked for. Guesses for a single token need its router (`prefetch`).
        """
        following = self.following
        if following is None or pairs < READ_AHEAD_USES * following.cache.num_experts:
            return iter(())
        cache = following.cache
        absent = (e for e, slot in enumerate(cache.slot_of) if slot < 0 and e not in cache.pending)
        return iter(sorted(absent, key=cache.counters.counts.__getitem__, reverse=True))

    def _read_ahead(self, scratch_row: int) -> None:
        following, expert = self.following, next(self._expected, None)
        if following is not None and expert is not None:
            self.arrivals.scratch.read_ahead(
                following.moe.index, following.store, following.moe.layout, expert, scratch_row, following.count_wasted
            )
