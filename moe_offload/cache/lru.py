"""Least recently used: the baseline that other policies are compared with.

With fewer slots than one token uses (K a layer) LRU hits nothing: each expert gives way before its next use. That is
why every layer has its own slots, at least K of them.
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
            self.last[e] = self.now + 1.0 - 1.0 / uses  # within a prompt, more uses count as later

    def victims(self, candidates: Iterable[int], n: int) -> list[int]:
        return sorted(candidates, key=self.last.__getitem__)[:n]

    def seed(self, rates: Sequence[float]) -> None:
        """Order experts by expected use; any real use counts as more recent."""
        top = max(rates, default=0.0) or 1.0
        self.last = [-1.0 + 0.5 * rate / top for rate in rates]
