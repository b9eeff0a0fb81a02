"""Belady's MIN (Belady, 1966), which is told all future events: the best hit rate that any cache could have had.

It is printed beside every hit rate. A running model cannot use it, since it does not know the future.

    Belady          MIN as a policy: the victims are the candidates whose next uses lie furthest ahead
    belady_hits     event by event, the most hits that any cache of so many slots could have had

One event is the set of experts that a layer needs at once: all of them must be resident together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

NEVER = 1 << 62


class Belady:
    """MIN as a policy. Events must be recorded in the order in which they were announced."""

    def __init__(self, num_experts: int, events: Sequence[Iterable[int]]):
        self.upcoming: list[list[int]] = [[NEVER] for _ in range(num_experts)]  # next one last
        for i in range(len(events) - 1, -1, -1):
            for e in events[i]:
                self.upcoming[e].append(i)

    def record(self, used: Mapping[int, int], tokens: int) -> None:
        for e in used:
            self.upcoming[e].pop()

    def victims(self, candidates: Iterable[int], n: int) -> list[int]:
        return sorted(candidates, key=lambda e: -self.upcoming[e][-1])[:n]

    def seed(self, rates: Sequence[float]) -> None:
        """Nothing to do: the future is known, so a profile adds nothing."""


def belady_hits(events: Sequence[Sequence[int]], slots: int, bypass: bool = False) -> list[int]:
    """For each event how many of its experts were resident before it. The cache starts empty.

    With `bypass` an expert may be used without being kept, when what would have to go is needed sooner.
    """
    upcoming: dict[int, list[int]] = {}
    for i in range(len(events) - 1, -1, -1):
        for e in events[i]:
            upcoming.setdefault(e, []).append(i)
    next_use: dict[int, int] = {}  # of what is resident
    hits = []
    for event in events:
        current = set(event)
        hits.append(sum(e in next_use for e in current))
        for e in current:
            upcoming[e].pop()
        new = {e: upcoming[e][-1] if upcoming[e] else NEVER for e in current}
        if bypass:
            pool = {**next_use, **new}
            next_use = dict(sorted(pool.items(), key=lambda item: item[1])[:slots])
            continue
        next_use.update(new)
        for e in sorted((e for e in next_use if e not in current), key=next_use.__getitem__, reverse=True):
            if len(next_use) <= slots:
                break
            del next_use[e]
    return hits
