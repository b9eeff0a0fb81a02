"""Least recently used: the baseline every cache is measured against.

Below one token cycle (K slots a layer) it hits exactly 0 %, which is why quotas are per layer with a floor of K.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


class LRU:
    def __init__(self, num_experts: int):
        self.now = 0
        self.last = [-1.0] * num_experts

    def access(self, used: Mapping[int, int], tokens: int) -> None:
        self.now += 1
        for e, uses in used.items():
            self.last[e] = self.now + 1.0 - 1.0 / uses  # of a prompt, what is used most: likely by its last tokens too

    def victims(self, candidates: Iterable[int], n: int) -> list[int]:
        return sorted(candidates, key=self.last.__getitem__)[:n]

    def seed(self, rates: Sequence[float]) -> None:
        """Rank by expected use, all of it before the first real one."""
        top = max(rates, default=0.0) or 1.0
        self.last = [-1.0 + 0.5 * rate / top for rate in rates]
