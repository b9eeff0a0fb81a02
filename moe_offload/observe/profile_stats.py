"""What a profile says of a workload: how skewed it is, what pinning its hottest would hit, how far from another.

Everything is per layer, and from counts alone. What counts cannot say is how uses follow each other, so no number here
is the hit rate of a running cache: that takes a trace (`simulate`, or `inspect --trace`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .profile import Profile


@dataclass(frozen=True)
class Skew:
    """How uneven the uses of one layer's experts are."""

    layer: int
    experts: int
    used: int  # how many experts were used at all
    entropy_bits: float  # 0: always the same expert; log2(experts): all alike
    effective: float  # the number of experts that would have that entropy if all were used alike
    top10: float  # share of the uses that the most used tenth of the experts has
    top25: float
    top50: float


def measure_skews(profile: Profile) -> list[Skew]:
    return [_skew(layer, counts) for layer, counts in enumerate(profile.counts)]


def coverage(counts: Sequence[int], slots: int) -> float:
    """Share of the uses that the `slots` most used experts have: the hit rate if just these were pinned."""
    total = sum(counts)
    return sum(sorted(counts, reverse=True)[:slots]) / total if total else 0.0


def pinned_hit_rate(profile: Profile, slots: Sequence[int]) -> float:
    """The hit rate, mean over layers, if the hottest experts, as many as each layer has slots, stayed for good."""
    return statistics.mean(coverage(counts, n) for counts, n in zip(profile.counts, slots, strict=True))


def measure_distances(a: Profile, b: Profile) -> list[float]:
    """The Jensen-Shannon distance of each layer (Lin, 1991; base 2): 0 for the same shares, 1 for disjoint experts.

    Raises ProfileError when the profiles are of different models.
    """
    b.check(a.fingerprint, of="the other profile")
    return [_distance(x, y) for x, y in zip(a.counts, b.counts, strict=True)]


def uses_per_token(profile: Profile, layer: int) -> list[float]:
    """Uses per token of each expert of `layer`: what a policy is seeded with."""
    return [count / max(profile.tokens, 1) for count in profile.counts[layer]]


def most_wanted(profile: Profile, slots: Sequence[int]) -> list[tuple[int, int]]:
    """(layer, expert) of what is worth a slot, the most used of all layers first: the order of pre-warming.

    Of each layer at most as many as it has slots, and none that was never used.
    """
    wanted = [
        (-profile.counts[layer][e], layer, e)
        for layer, n in enumerate(slots)
        for e in profile.hottest(layer)[:n]
        if profile.counts[layer][e]
    ]
    return [(layer, e) for _, layer, e in sorted(wanted)]


def _skew(layer: int, counts: Sequence[int]) -> Skew:
    entropy = _entropy_bits(_shares(counts))
    tops = (coverage(counts, math.ceil(share * len(counts))) for share in (0.1, 0.25, 0.5))
    return Skew(layer, len(counts), sum(c > 0 for c in counts), entropy, 2.0**entropy, *tops)


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [count / total for count in counts] if total else [0.0] * len(counts)


def _entropy_bits(shares: Sequence[float]) -> float:
    return -sum(p * math.log2(p) for p in shares if p > 0)


def _distance(a: Sequence[int], b: Sequence[int]) -> float:
    p, q = _shares(a), _shares(b)
    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    divergence = _entropy_bits(middle) - (_entropy_bits(p) + _entropy_bits(q)) / 2
    return math.sqrt(min(max(divergence, 0.0), 1.0))  # rounding may leave it just outside
