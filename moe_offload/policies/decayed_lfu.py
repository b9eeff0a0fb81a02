"""Decay-weighted least frequently used: a count of uses in which old ones fade.

    score(e) <- score(e) * 2 ** (-dt / half_life) + 1        on every use, dt in tokens

The uses of a prompt come as one number; they are taken to be spread evenly over its tokens, so that the first of a long
prompt have faded when its last is read (`mean_decay`).

This is LRFU (Lee et al., 2001) with the time unit of tokens. Scores of different experts are compared at one moment, so
it suffices to keep `key(e) = log2(score(e)) + last_use(e) / half_life`, which does not change while time passes:
nothing is renormalised, nothing overflows, and victims are the smallest keys.

A half-life of 16 to 32 tokens is best on recorded routing with K >= 4 (design.md, section 5); 256 loses most of the
gain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

NEVER = -math.inf


def mean_decay(tokens: int, half_life: float) -> float:
    """What is left, on average, of uses that are spread evenly over the last `tokens` tokens: 1 for a single one."""
    if tokens <= 1:  # 0: in a cache of all layers, where a forward's tokens count once
        return 1.0
    one = -math.expm1(-math.log(2.0) / half_life)
    return -math.expm1(-math.log(2.0) * tokens / half_life) / (tokens * one)


class DecayedLFU:
    def __init__(self, num_experts: int, half_life: float):
        self.half_life = half_life
        self.now = 0.0  # tokens seen by this layer, in half-lives
        self.keys = [NEVER] * num_experts

    def record(self, used: Mapping[int, int], tokens: int) -> None:
        self.now += tokens / self.half_life
        now, keys, weight = self.now, self.keys, mean_decay(tokens, self.half_life)
        for e, uses in used.items():
            keys[e] = now + math.log2(2.0 ** (keys[e] - now) + weight * uses)

    def victims(self, candidates: Iterable[int], n: int) -> list[int]:
        return sorted(candidates, key=self.keys.__getitem__)[:n]

    def seed(self, rates: Sequence[float]) -> None:
        """Start from the scores that an endless stream with these uses per token would have accumulated by now."""
        steady = self.half_life / math.log(2.0)  # sum over t of 2 ** (-t / half_life)
        for e, rate in enumerate(rates):
            self.keys[e] = self.now + math.log2(steady * rate) if rate > 0 else NEVER

    def score(self, expert: int) -> float:
        """The decayed count as of now."""
        return float(2.0 ** (self.keys[expert] - self.now))
