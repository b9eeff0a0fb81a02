"""LRFU in classes, as merged in llama.cpp: the oldest goes first, and each doubling of its score halves its age.

class = floor(log2(score)), 0 to 7      score: uses decayed with a half-life of 128 tokens
victims = the largest age / 2 ** class   age: tokens since the last use
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from .decay import Rate

HALF_LIFE = 128.0  # tokens
CLASSES = 8


class LRFUClasses:
    def __init__(self, num_experts: int):
        self.uses = Rate(num_experts, HALF_LIFE)
        self.last = [-math.inf] * num_experts  # token of the last use
        self.now = 0.0

    def access(self, used: Mapping[int, int], tokens: int) -> None:
        self.uses.add(used, tokens)
        self.now += tokens
        for e in used:
            self.last[e] = self.now

    def victims(self, candidates: Iterable[int], n: int) -> list[int]:
        return sorted(candidates, key=self._rank)[:n]

    def seed(self, rates: Sequence[float]) -> None:
        self.uses.seed(rates)
        self.last = [self.now if rate > 0 else -math.inf for rate in rates]

    def _rank(self, expert: int) -> tuple[float, float]:
        used = self.uses.used[expert]
        score = used / self.uses.unit
        cls = min(max(math.floor(math.log2(score)), 0), CLASSES - 1) if score > 0 else 0
        return (self.last[expert] - self.now) / 2.0**cls, used
