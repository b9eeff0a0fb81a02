"""Belady's MIN (Belady, 1966), which is told all future events: the best hit rate that any cache could have had.

It is printed beside every hit rate. A running model cannot use it, since it does not know the future.

One event is the set of experts that a layer needs at once: all of them must be resident together. Who is needed last
gives way. The residents stand in a heap by their next use, so that a long trace takes seconds a layer without anything
compiled; entries of uses that have passed are left in it until they are half of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush

NEVER = 1 << 62


def belady_hits(events: Sequence[Mapping[int, int]], slots: int, bypass: bool = False) -> list[int]:
    """The most hits that any cache could have had, event by event. It starts empty.

    Args:
        events: Of each event, how many of its tokens use each expert.
        slots: How many experts are resident after an event, at most.
        bypass: Whether an expert may be used without being kept, when what would have to go is needed sooner. Those of
            an event that does not fit the slots (a prompt) always may.

    Returns:
        For each event, how many of its experts were resident before it.
    """
    hits, next_use, heap = [], dict[int, int](), list[tuple[int, int]]()
    for used, upcoming in zip(events, _next_uses(events), strict=True):
        hits.append(sum(e in next_use for e in used))
        for e, at in zip(used, upcoming, strict=True):
            next_use[e] = at
            heappush(heap, (-at, e))
        may_pass = bypass or sum(used.values()) > slots  # as LayerCache.fits says
        kept: list[tuple[int, int]] = []
        while len(next_use) > slots:
            latest = heappop(heap)
            at, e = -latest[0], latest[1]
            if next_use.get(e) != at:
                continue  # it has been used, or has gone, since
            if e in used and not may_pass:
                kept.append(latest)
            else:
                del next_use[e]
        for entry in kept:
            heappush(heap, entry)
        if len(heap) > 2 * len(next_use) + 64:
            heap = [(-at, e) for e, at in next_use.items()]
            heapify(heap)
    return hits


def _next_uses(events: Sequence[Mapping[int, int]]) -> list[list[int]]:
    """For each event and its experts, in their order, the next event that uses the expert."""
    following: dict[int, int] = {}
    found: list[list[int]] = []
    for i in range(len(events) - 1, -1, -1):
        found.append([following.get(e, NEVER) for e in events[i]])
        following.update(dict.fromkeys(events[i], i))
    return found[::-1]
