"""How often each expert was used, old uses counting less and less, kept with additions and multiplications alone.

    score(e) <- score(e) * 2 ** (-dt / half_life) + 1        on every use, dt in tokens

Multiplying every score at every token would cost E products. Instead each new use counts more than those before it: it
adds `unit`, which doubles with every half-life. Scores are only compared with each other at one moment, so the common
factor does not matter. Only `+`, `*` and `/` on doubles are used, so that the kernels that do the same on a device
(runtime/kernels) get the same bits.

The uses of a prompt come as one number; they are taken to be spread evenly over its tokens, so that the first of a long
prompt have faded when its last is read (`mean_decay`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

FULL = 2.0**200  # a unit larger than this is divided out of all scores, long before it would overflow
MOST = 64.0  # an event lets at most so many half-lives pass: by then a use has faded to 2**-64 anyway


def mean_decay(tokens: int, half_life: float) -> float:
    """What is left, on average, of uses that are spread evenly over the last `tokens` tokens: 1 for a single one."""
    if tokens <= 1:  # 0: in a simulated cache of all layers, a forward's tokens count with its first layer alone
        return 1.0
    one = -math.expm1(-math.log(2.0) / half_life)
    return -math.expm1(-math.log(2.0) * tokens / half_life) / (tokens * one)


def unit_growth(tokens: int, half_life: float) -> float:
    """What the unit is multiplied with when that many tokens pass."""
    return float(2.0 ** min(tokens / half_life, MOST))


class Rate:
    """Decayed uses of each expert, in units of one use now."""

    def __init__(self, num_experts: int, half_life: float):
        self.half_life = half_life
        self.share = -math.expm1(-math.log(2.0) / half_life)  # decayed uses * share = average uses per token
        self.growth = unit_growth(1, half_life)
        self.unit = 1.0
        self.used = [0.0] * num_experts

    def add(self, event: Mapping[int, int], tokens: int) -> None:
        used = self.used
        if tokens == 1:
            self.unit = unit = self.unit * self.growth
            for e in event:
                used[e] += unit
        else:
            self.unit = unit = self.unit * unit_growth(tokens, self.half_life)
            weight = unit * mean_decay(tokens, self.half_life)
            for e, uses in event.items():
                used[e] += weight * uses
        if unit > FULL:
            self.used, self.unit = [u / unit for u in used], 1.0

    def seed(self, rates: Sequence[float]) -> None:
        """Start from what an endless stream with these uses per token would have left by now."""
        self.used = [rate * self.unit / self.share for rate in rates]
