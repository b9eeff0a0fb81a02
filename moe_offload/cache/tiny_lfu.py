"""TinyLFU (Einziger et al., 2017): counts that are all halved when ten uses an expert have been seen.

Its admission filter keeps a newcomer out when what would give way has been used more. A missing expert must be read
here anyway, so the filter comes one event late: the newcomer is a candidate like any other at the next miss, and leaves
first unless it has been used more. Among equals the least recently used goes. E is small: counts are exact, no sketch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

SAMPLE = 10  # uses per expert between two halvings


class TinyLFU:
    def __init__(self, num_experts: int):
        self.sample = SAMPLE * num_experts
        self.seen = 0
        self.now = 0
        self.uses = [0.0] * num_experts
        self.last = [-1.0] * num_experts

    def access(self, used: Mapping[int, int], tokens: int) -> None:
        self.now += 1
        for e, uses in used.items():
            self.uses[e] += uses
            self.last[e] = self.now
            self.seen += uses
        while self.seen >= self.sample:
            self.uses = [uses / 2 for uses in self.uses]
            self.seen //= 2

    def victims(self, candidates: Iterable[int], n: int) -> list[int]:
        return sorted(candidates, key=lambda e: (self.uses[e], self.last[e]))[:n]

    def seed(self, rates: Sequence[float]) -> None:
        top = max(1.0, max(rates, default=0.0))
        self.uses = [SAMPLE * rate / top for rate in rates]
