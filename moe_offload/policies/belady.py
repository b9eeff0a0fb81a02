"""Belady's MIN as a policy: it is told what is to come. The roof of every table, never of a running model.

Victims are the candidates whose next uses lie furthest ahead (Belady, 1966). Events must be recorded in the order in
which they were announced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

NEVER = 1 << 62


class Belady:
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
        """It knows better than any profile."""
