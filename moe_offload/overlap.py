"""Compute what is resident while the rest loads, then the pairs of each row as it arrives.

Shapes: P token-expert pairs, E experts, S slots, N elements of one row.

    resident pairs    ████████
    row 1 (to a slot) ░░░░░░██                  ░ on its way   █ computed
    row 2             ░░░░░░░░██
    rows past the slots, through scratch ░░░░██   and scratch that has done its part reads ahead for the next layer
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .arrivals import Arrivals
from .buffers import Rows

EXPECTED_USES = 2  # pairs per expert from which on reading ahead for the next layer is no guess


class RunCore(Protocol):
    """The experts code of one site: a result per pair, or, given `rows` (ascending positions or a slice), for those.

    There are as many `slots` as results.
    """

    def __call__(
        self,
        x_P: Tensor,
        slots: Tensor,
        bank_SN: Tensor,
        others: Sequence[Tensor],
        rows: Tensor | slice | None = None,
    ) -> Tensor: ...


def compute_while_loading(
    arrivals: Arrivals,
    following: Arrivals | None,
    x_P: Tensor,
    ids_P: Tensor,
    core: RunCore,
    others: Sequence[Tensor],
    past: Sequence[int],
) -> Tensor:
    """The result of every pair, in their order. `ids_P` is on the host.

    `past` are experts without a slot: as many of their rows as there is scratch are on their way at any time. Rows of
    `following` that will probably be asked for are read into scratch that has done its part.
    """
    wave = _Wave(arrivals, following, x_P, ids_P, core, others, deque(past))
    arrivals.transfer.get_going()
    # Rows read ahead first: until they are out of scratch, nothing more can be read into it.
    while wave.next_is_in_scratch():
        wave.compute_next()
    wave.compute_resident()
    while arrivals.demanded:
        wave.compute_next()
    if wave.out_P is None or wave.past:  # there was a load, so there were pairs; and nobody is to be left out
        raise AssertionError(f"{arrivals.bank.name}: experts {list(wave.past)} were not computed")
    return wave.out_P


class _Wave:
    """One event under way: what of it has been computed, and what still loads."""

    def __init__(
        self,
        arrivals: Arrivals,
        following: Arrivals | None,
        x_P: Tensor,
        ids_P: Tensor,
        core: RunCore,
        others: Sequence[Tensor],
        past: deque[int],
    ):
        self.arrivals, self.following, self.past = arrivals, following, past
        self.x_P, self.ids_P, self.core, self.others = x_P, ids_P, core, others
        self.out_P: Tensor | None = None
        self.expected = self._expected_next()
        self._fill_scratch()
        cache = arrivals.cache
        absent = [one.expert for one in arrivals.demanded] + list(past)
        here_E = torch.ones(cache.num_experts, dtype=torch.bool)
        here_E[absent] = False
        # What is decided about pairs is decided on the host; positions and slots go to where the pairs are.
        here = here_E[ids_P].nonzero().flatten()
        self.slots_here = torch.tensor(cache.slot_of)[ids_P[here]].to(x_P.device)
        self.here = here.to(x_P.device)
        # Grouped experts code has sorted its pairs: those of one expert are neighbours, and need no gathering.
        in_order = bool((ids_P[1:] >= ids_P[:-1]).all())
        self.order_P = None if in_order else ids_P.argsort(stable=True).to(x_P.device)
        self.ends_E = ids_P.bincount(minlength=cache.num_experts).cumsum(0).tolist()

    def next_is_in_scratch(self) -> bool:
        demanded = self.arrivals.demanded
        return bool(demanded) and demanded[0].place >= 0 and demanded[0].ticket.done.is_set()

    def compute_resident(self) -> None:
        if len(self.here):
            self._compute(self.here, self.slots_here, self.arrivals.slots)

    def compute_next(self) -> None:
        """The pairs of the next row to arrive; its place in scratch, if it has one, goes to the next in need."""
        arrivals = self.arrivals
        arrival = arrivals.take()
        e = arrival.expert
        rows = slice(self.ends_E[e - 1] if e else 0, self.ends_E[e])
        source, i = (arrivals.scratch, arrival.place) if arrival.load is None else (arrivals.slots, arrival.load.slot)
        slots = torch.full((rows.stop - rows.start,), i, device=self.x_P.device)
        self._compute(rows if self.order_P is None else self.order_P[rows], slots, source)
        if arrival.place >= 0:
            if self.past:
                arrivals.send(self.past.popleft(), None, arrival.place)
            else:
                self._read_ahead(arrival.place)

    def _compute(self, rows: Tensor | slice, slots: Tensor, source: Rows) -> None:
        part = self.core(self.x_P, slots, source.bank_SN, self.others, rows)
        if self.out_P is None:
            self.out_P = part.new_empty((len(self.ids_P), *part.shape[1:]))
        if isinstance(rows, slice):
            self.out_P[rows] = part
        else:
            self.out_P.index_copy_(0, rows, part)

    def _fill_scratch(self) -> None:
        """Rows past the slots into whatever scratch is free; what is left over reads ahead."""
        arrivals, past = self.arrivals, self.past
        taken = {held.place for held in arrivals.held.values()} | {one.place for one in arrivals.demanded}
        places = deque(i for i in range(len(arrivals.scratch.rows)) if i not in taken)
        for e in [e for e in past if e in arrivals.held]:  # these first: they are here, or will be soon
            past.remove(e)
            arrivals.send(e, None)
        while places and past:
            arrivals.send(past.popleft(), None, places.popleft())
        for place in places:
            self._read_ahead(place)

    def _expected_next(self) -> Iterator[int]:
        """Experts that the following layer will probably need and has to read, the likeliest first.

        Only where an event uses most experts of a layer, as a long prompt does: then what is absent there will mostly
        be asked for. Guesses for a single token need its router (`prefetch`).
        """
        following = self.following
        if following is None or len(self.ids_P) < EXPECTED_USES * following.cache.num_experts:
            return iter(())
        cache = following.cache
        absent = (e for e, slot in enumerate(cache.slot_of) if slot < 0 and e not in cache.pending)
        return iter(sorted(absent, key=cache.counters.counts.__getitem__, reverse=True))

    def _read_ahead(self, place: int) -> None:
        following, expert = self.following, next(self.expected, None)
        if following is not None and expert is not None:
            self.arrivals.shared.read_ahead(
                following.bank.index, following.store, following.bank.layout, expert, place, following.count_wasted
            )
