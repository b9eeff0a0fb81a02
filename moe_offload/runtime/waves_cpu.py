"""Compute what is resident while the rest loads, then the pairs of each row as it arrives: on a CPU, whose threads do
both. On a device with streams the host only launches (waves_device.py).

Shapes: P token-expert pairs, E experts, S slots, N elements of one row.

    resident pairs    ████████
    row 1 (to a slot) ░░░░░░██                  ░ on its way   █ computed
    row 2             ░░░░░░░░██
    rows without a slot, through scratch ░░░░██   and scratch that has done its part reads ahead for the next layer
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..memory.buffers import Rows
from .ahead.scratch_feed import Feed
from .in_flight import Arrivals


class RunCore(Protocol):
    """The experts code of one site: a result per pair, or, given `pairs_R`, one for each pair of a wave.

    `pairs_R` are R positions, each once, or a slice. There is a slot for each result.
    """

    def __call__(
        self,
        x_P: Tensor,
        slots_R: Tensor,
        bank_SN: Tensor,
        others: Sequence[Tensor],
        pairs_R: Tensor | slice | None = None,
    ) -> Tensor: ...


def compute_while_loading(
    arrivals: Arrivals,
    following: Arrivals | None,
    x_P: Tensor,
    ids_P: Tensor,
    core: RunCore,
    others: Sequence[Tensor],
    without_slot: Sequence[int],
    own: Container[int] | None = None,
) -> Tensor:
    """The result of every pair, in their order; zeros for those of experts of other processes, with the id E.

    `without_slot` are experts without a slot: as many of their rows as there is scratch are on their way at any time.
    Rows of `following` that will probably be asked for are read into scratch that has done its part. Where rows that
    others will compute with are awaited as well, `own` are those that are computed with here.
    """
    feed = Feed(arrivals, following, len(ids_P), without_slot)
    feed.claim()
    feed.fill()
    wave = _Wave(arrivals, feed, x_P, ids_P, core, others)
    arrivals.transfer.get_going()
    # Rows read ahead first: until they are out of scratch, nothing more can be read into it.
    while wave.next_is_in_scratch():
        wave.compute_next()
    wave.compute_resident()
    while arrivals.awaited and (own is None or any(one.expert in own for one in arrivals.awaited)):
        wave.compute_next()
    if wave.out_P is None or feed.without_slot:  # there was a load, so there were pairs; and nobody is to be left out
        raise AssertionError(f"{arrivals.moe.name}: experts {list(feed.without_slot)} were not computed")
    return wave.out_P


class _Wave:
    """One event under way: what of it has been computed, and what still loads."""

    def __init__(
        self,
        arrivals: Arrivals,
        feed: Feed,
        x_P: Tensor,
        ids_P: Tensor,
        core: RunCore,
        others: Sequence[Tensor],
    ):
        self.arrivals, self.feed = arrivals, feed
        self.x_P, self.ids_P, self.core, self.others = x_P, ids_P, core, others
        self.out_P: Tensor | None = None
        cache = arrivals.cache
        absent = [one.expert for one in arrivals.awaited] + list(feed.without_slot)
        here = torch.ones(cache.num_experts + 1, dtype=torch.bool, device="cpu")
        here[[*absent, cache.num_experts]] = False
        self.resident_R = here[ids_P].nonzero().flatten()
        self.resident_slots_R = torch.tensor(cache.slot_of, device="cpu")[ids_P[self.resident_R]]
        # Grouped experts code has sorted its pairs: those of one expert are neighbours, and need no gathering.
        in_order = bool((ids_P[1:] >= ids_P[:-1]).all())
        self.order_P = None if in_order else ids_P.argsort(stable=True)
        self.ends_E = ids_P.bincount(minlength=cache.num_experts).cumsum(0).tolist()
        self.all_here = self.ends_E[cache.num_experts - 1] == len(ids_P)

    def next_is_in_scratch(self) -> bool:
        awaited = self.arrivals.awaited
        return bool(awaited) and awaited[0].scratch_row >= 0 and awaited[0].ticket.done.is_set()

    def compute_resident(self) -> None:
        if len(self.resident_R):
            self._compute(self.resident_R, self.resident_slots_R, self.arrivals.slots)

    def compute_next(self) -> None:
        """The pairs of the next row to arrive, if any; its scratch row, if it has one, goes to the next in need."""
        arrivals = self.arrivals
        arrival = arrivals.take()
        e = arrival.expert
        pairs = slice(self.ends_E[e - 1] if e else 0, self.ends_E[e])
        source, i = (
            (arrivals.scratch_rows, arrival.scratch_row)
            if arrival.load is None
            else (arrivals.slots, arrival.load.slot)
        )
        if pairs.stop > pairs.start:
            slots_R = torch.full((pairs.stop - pairs.start,), i, device="cpu")
            self._compute(pairs if self.order_P is None else self.order_P[pairs], slots_R, source)
        if arrival.scratch_row >= 0:
            self.feed.reuse(arrival.scratch_row)

    def _compute(self, pairs_R: Tensor | slice, slots_R: Tensor, source: Rows) -> None:
        part = self.core(self.x_P, slots_R, source.bank_SN, self.others, pairs_R)
        if self.out_P is None:
            make = part.new_empty if self.all_here else part.new_zeros
            self.out_P = make((len(self.ids_P), *part.shape[1:]))
        if isinstance(pairs_R, slice):
            self.out_P[pairs_R] = part
        else:
            self.out_P.index_copy_(0, pairs_R, part)
