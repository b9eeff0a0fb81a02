"""Compute what is resident while the rest loads, then rows that have arrived, many at a time: on a device with streams.

Shapes: P token-expert pairs, E experts, S slots, N elements of one row.

    copies   ░a░a░b░b░c░c░d░d░a░a░b░b     parts of the scratch rows, in turn: one is computed while the others load
    compute  ██resident██ █a █b █c █d

The host only launches: what it decides about experts reaches the device in one table, and what follows from that for
pairs is worked out there. Every launch costs the same however many pairs it is for, hence groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..memory.buffers import Rows
from .ahead.scratch_feed import Feed
from .in_flight import Arrival, Arrivals
from .waves_cpu import RunCore


@dataclass(frozen=True)
class Group:
    """Experts computed at once, `experts[i]` from row `rows[i]` of the slots or of scratch."""

    experts: list[int]
    rows: list[int]
    in_slots: bool
    here: bool = False


def count_uses(ids_P: Tensor, num_experts: int) -> Counter[int]:
    """How many pairs use each expert. The host waits for the device here, once, for E numbers."""
    inside_P = (ids_P >= 0) & (ids_P < num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_P.device)
    counts.index_add_(0, torch.where(inside_P, ids_P, num_experts), torch.ones_like(ids_P, dtype=torch.int64))
    *counts_E, outside = counts.tolist()
    if outside:  # somebody has to say which
        return Counter(ids_P.tolist())
    return Counter({e: count for e, count in enumerate(counts_E) if count})


def compute_in_groups(
    arrivals: Arrivals,
    following: Arrivals | None,
    x_P: Tensor,
    ids_P: Tensor,
    used: Mapping[int, int],
    core: RunCore,
    others: Sequence[Tensor],
    without_slot: Sequence[int],
) -> Tensor:
    """The result of every pair, in their order. `ids_P` is on the device; `used` says how often each expert is in it.

    `without_slot` and `following` are those of `compute_while_loading`.
    """
    feed = Feed(arrivals, following, len(ids_P), without_slot)
    feed.claim()
    ahead = arrivals.scratch_first()
    with arrivals.transfer.together(arrivals.group_rows):
        feed.fill()
    groups = _groups(arrivals, feed, used, ahead)
    order_P, slots_P = _in_order(arrivals, groups, ids_P)
    out_P: Tensor | None = None
    end = 0
    for group in groups:
        taken = [] if group.here else [arrivals.take() for _ in group.experts]
        if taken and [(one.expert, _row(one)) for one in taken] != list(zip(group.experts, group.rows, strict=True)):
            raise AssertionError(f"{arrivals.moe.name}: {taken} arrived, and {group} is next")
        begin, end = end, end + sum(used[e] for e in group.experts)
        source: Rows = arrivals.slots if group.in_slots else arrivals.scratch_rows
        part = core(x_P, slots_P[begin:end], source.bank_SN, others, order_P[begin:end])
        if out_P is None:
            out_P = part.new_empty((len(ids_P), *part.shape[1:]))
        out_P.index_copy_(0, order_P[begin:end], part)
        with arrivals.transfer.together(arrivals.group_rows):
            for one in taken:
                if one.scratch_row >= 0:
                    feed.reuse(one.scratch_row)
    if out_P is None or end != len(ids_P) or arrivals.awaited or feed.without_slot:
        raise AssertionError(f"{arrivals.moe.name}: {end} of {len(ids_P)} pairs were computed")
    return out_P


def _groups(arrivals: Arrivals, feed: Feed, used: Mapping[int, int], ahead: int) -> list[Group]:
    """What is computed when: the `ahead` rows that were read ahead, residents, then the rest as it was asked for.

    Until rows are out of scratch nothing more can be read into it, so what lies there goes before what is resident.
    All is known beforehand: rows arrive in the order they are asked for, and a scratch row that has done its part goes
    to the next expert without a slot.
    """
    most = arrivals.group_rows
    absent = {one.expert for one in arrivals.awaited}.union(feed.without_slot)
    here = [e for e in used if e not in absent]
    coming = [(one.expert, _row(one), one.load is not None) for one in arrivals.awaited]
    in_turn = [one.scratch_row for one in arrivals.awaited if one.scratch_row >= 0]
    for i, e in enumerate(feed.without_slot):
        in_turn.append(in_turn[i])
        coming.append((e, in_turn[i], False))
    groups = list(_split(coming[:ahead], most))
    if here:
        groups.append(Group(here, [arrivals.cache.slot_of[e] for e in here], in_slots=True, here=True))
    return groups + list(_split(coming[ahead:], most))


def _split(coming: Sequence[tuple[int, int, bool]], most: int) -> Iterator[Group]:
    """Neighbours that lie in one buffer, `most` at a time."""
    for in_slots, same in groupby(coming, lambda one: one[2]):
        rest = list(same)
        for part in (rest[i : i + most] for i in range(0, len(rest), most)):
            yield Group([expert for expert, _, _ in part], [row for _, row, _ in part], in_slots)


def _row(arrival: Arrival) -> int:
    return arrival.scratch_row if arrival.load is None else arrival.load.slot


def _in_order(arrivals: Arrivals, groups: Sequence[Group], ids_P: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs in the order of `groups`, those of one expert next to each other; and the row of each in that order."""
    table_2E = torch.zeros((2, arrivals.cache.num_experts), dtype=torch.int64, device="cpu")
    experts = [e for group in groups for e in group.experts]
    table_2E[0, experts] = torch.arange(len(experts), device="cpu")
    table_2E[1, experts] = torch.tensor([row for group in groups for row in group.rows], device="cpu")
    rank_P, slots_P = arrivals.transfer.send(table_2E).index_select(1, ids_P).unbind()
    order_P = rank_P.argsort(stable=True)
    return order_P, slots_P[order_P]
