"""One layer whose experts are asked for one by one, by the model's own code: each is resident while it is in use.

    expect(ids)        what will probably be asked for: loads begin early. A hint: it may be wrong
    begin(e, rows)     expert e is in use, with so many rows of input: its slot, once the row is there
    end(e)             it is no longer
    again(e)           another weight of an expert that was begun: it is no other use

Nobody says what a forward needs before it asks, so an *event* of the other layers is put together here from calls: it
ends where an expert is asked for again, or with the forward. Hits and misses are counted at once, uses at its end. One
slot is enough, since an expert is done when its call returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError
from .in_flight import Arrivals

if TYPE_CHECKING:
    from ..observe.trace.recorder import TraceRecorder

AHEAD = 4  # rows on their way that nobody has asked for yet: as many as there are reader threads


class Calls:
    """The calls of one layer. Whoever uses it holds the model's lock."""

    def __init__(self, arrivals: Arrivals):
        self.arrivals, self.cache = arrivals, arrivals.cache
        self.recorder: TraceRecorder | None = None  # of the model, while its trace is recorded
        self.used: dict[int, int] = {}  # {expert: rows} of the event that is going on
        self.expected: dict[int, None] = {}  # of a hint, what has not been asked for yet; empty where all of it is here
        self.in_use: list[int] = []  # innermost last: an expert may call another one
        self.on_failure: Callable[[], None] | None = None  # of whoever lends the slots to the model's code
        self.end_events: Callable[[], None] = self.end_event  # of all layers of the model, in order; set by `Runtime`

    def begin(self, expert: int, rows: int) -> int:
        """The slot that holds `expert`, which stays there until `end`."""
        if expert in self.used:
            if expert in self.in_use:
                self.in_use.append(expert)
                return self.cache.slot_of[expert]
            self.end_events()
        slot = self.cache.slot_of[expert]
        if slot < 0:
            slot = self._fetch(expert)
        else:
            self.cache.counters.hits += 1
        self.used[expert] = rows
        self.in_use.append(expert)
        if self.expected:
            self.expected.pop(expert, None)
            self._read_ahead()
        return slot

    def again(self, expert: int) -> int:
        """The slot of an expert that the event has asked for already, for another of its weights. Where it has given
        way meanwhile it is read anew."""
        slot = self.cache.slot_of[expert]
        return slot if slot >= 0 else self._fetch(expert)

    def end(self) -> None:
        """The expert that was begun last is no longer in use."""
        self.in_use.pop()

    def expect(self, experts: Iterable[int]) -> None:
        """These will probably be asked for next, in this order."""
        known = dict.fromkeys(e for e in experts if 0 <= e < self.cache.num_experts)
        slot_of = self.cache.slot_of
        if any(slot_of[e] < 0 for e in known):
            self.expected = known
            self._read_ahead()

    def end_event(self) -> None:
        """What has been asked for since the last event is one: the policy, the counters and a trace hear of it."""
        used, self.used, self.expected = self.used, {}, {}
        if not used:
            return
        pairs = sum(used.values())
        tokens = max(self.arrivals.moe.tokens_of(pairs), *used.values(), 0)
        self.cache.policy.access(used, tokens)
        self.cache.counters.count_event(used, tokens)
        if self.recorder is not None:
            self.recorder.event(self.arrivals.moe.index, list(_spread(used)), tokens)

    def give_up(self) -> None:
        """A forward has failed: nothing is in use, whatever it was that did not come to its end."""
        self.in_use.clear()
        if self.on_failure is not None:
            self.on_failure()
        self.end_event()

    def _fetch(self, expert: int) -> int:
        arrivals, cache = self.arrivals, self.cache
        try:
            arrivals.begin({expert, *self.in_use, *self.expected})
            load = None
            if expert not in cache.pending:
                load = cache.demand(expert, {*self.in_use, *self.expected})
                if load is None:  # every slot is on its way for somebody else
                    arrivals.begin({expert, *self.in_use})
                    load = cache.demand(expert, self.in_use)
                if load is None:
                    raise UnsupportedModelError(
                        f"{arrivals.moe.name}: expert {expert} is called inside of {len(self.in_use)} other experts of "
                        f"the layer, which has {cache.slots} slots; use a budget with at least one more in each layer"
                    )
            arrivals.claim_guesses({expert})
            arrivals.start([] if load is None else [load])
            arrivals.take_all()
        except BaseException:
            arrivals.abort()
            raise
        return cache.slot_of[expert]

    def _read_ahead(self) -> None:
        """Begin to read what is expected and missing, into slots that nobody waits for."""
        arrivals = self.arrivals
        if arrivals.under_way and not arrivals.guessed:
            arrivals.abort()  # an event that was interrupted left something behind
        room = min(AHEAD, self.cache.slots - len(self.in_use)) - len(arrivals.guessed)
        arrivals.read_ahead(self.cache.guess(list(self.expected), room, self.in_use))


def _spread(used: dict[int, int]) -> Iterator[int]:
    """`{expert: uses}` as the ids of pairs."""
    for expert, uses in used.items():
        for _ in range(uses):
            yield expert
