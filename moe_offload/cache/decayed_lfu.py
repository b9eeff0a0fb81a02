"""Decay-weighted least frequently used: a count of uses in which old ones fade (`decay.py`); the smallest gives way.

This is LRFU (Lee et al., 2001) with tokens as its unit of time. On recorded routing with 4 or more experts a token, a
half-life of 16 to 32 tokens was best, and 256 lost most of the gain. An expert that was not used for a thousand
half-lives counts as never used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .decay import Rate


class DecayedLFU:
    def __init__(self, num_experts: int, half_life: float):
        self.rate = Rate(num_experts, half_life)

    def access(self, used: Mapping[int, int], tokens: int) -> None:
        self.rate.add(used, tokens)

    def victims(self, candidates: Iterable[int], n: int) -> list[int]:
        return sorted(candidates, key=self.rate.used.__getitem__)[:n]

    def seed(self, rates: Sequence[float]) -> None:
        self.rate.seed(rates)

    def score(self, expert: int) -> float:
        """The decayed count as of now."""
        return self.rate.used[expert] / self.rate.unit
