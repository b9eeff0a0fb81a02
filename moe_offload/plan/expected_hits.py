"""What share of requests a cache answers, before a model has run: from a profile of it, or from recorded workloads.

Both are figures to plan with, not promises. A profile's is what its hottest experts would serve if they stayed for
good; a cache that adapts may do better, another workload worse. The recorded ones are of other models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..observe.profile import Profile
from ..observe.profile_stats import pinned_hit_rate

#: `(share of a layer's experts that have slots, hit rate)`, replayed with
#:   moe-offload simulate TRACE... --policies default --start warm --residency 12.5%,20%,...,95%     (2026-11-26)
#: from traces of real routing, published by others (Apache-2.0 and MIT): AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting
#: at 72b368f60045, a half of its clean requests (83081 tokens of decode, 4 of 32 experts), and deepseek-ai/ESFT at
#: 579a7711e4b3 (8222 and 8327 tokens, 6 of 64 experts). No long trace of a model with 128 experts was to be had.
RECORDED: dict[str, list[tuple[float, float]]] = {
    "gpt-oss-20b, benchmark questions": [
        (4 / 32, 0.441), (6 / 32, 0.598), (8 / 32, 0.704), (10 / 32, 0.781), (13 / 32, 0.861), (16 / 32, 0.914),
        (19 / 32, 0.948), (22 / 32, 0.971), (26 / 32, 0.989), (29 / 32, 0.997), (30 / 32, 0.998),
    ],
    "deepseek-v2-lite, intent to JSON": [
        (8 / 64, 0.367), (13 / 64, 0.522), (16 / 64, 0.585), (19 / 64, 0.637), (26 / 64, 0.735), (32 / 64, 0.801),
        (38 / 64, 0.856), (45 / 64, 0.910), (51 / 64, 0.948), (58 / 64, 0.983), (61 / 64, 0.993),
    ],
    "deepseek-v2-lite, legal judgement": [
        (8 / 64, 0.366), (13 / 64, 0.487), (16 / 64, 0.544), (19 / 64, 0.595), (26 / 64, 0.696), (32 / 64, 0.771),
        (38 / 64, 0.834), (45 / 64, 0.896), (51 / 64, 0.939), (58 / 64, 0.978), (61 / 64, 0.990),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class HitRate:
    """An expected hit rate with its range, and in `source` what it is taken from."""

    expected: float
    low: float
    high: float
    source: str

    def __str__(self) -> str:
        spread = f" ({self.low:.0%} to {self.high:.0%})" if self.low != self.high else ""
        return f"{self.expected:.0%}{spread}, {self.source}"


def typical_hit_rate(slots: Sequence[int], experts: Sequence[int]) -> HitRate:
    """The mean over layers of what recorded workloads of other models had at the same shares of slots."""
    rates = [
        sum(_at(s / e, curve) for s, e in zip(slots, experts, strict=True)) / len(slots) for curve in RECORDED.values()
    ]
    source = f"typical of {len(RECORDED)} recorded workloads of other models"
    return HitRate(sum(rates) / len(rates), min(rates), max(rates), source)


def covered_hit_rate(slots: Sequence[int], profile: Profile) -> HitRate:
    """The share of the profile's requests that its hottest experts, as many as there are slots, would have served."""
    rate = pinned_hit_rate(profile, slots)
    return HitRate(rate, rate, rate, f"what the profile's hottest experts cover ({profile.tokens} tokens)")


def _at(share: float, curve: Sequence[tuple[float, float]]) -> float:
    """The hit rate at `share`: linear between the points of `curve`, 0 without slots, 1 with one for every expert."""
    for (x0, y0), (x1, y1) in pairwise([(0.0, 0.0), *curve, (1.0, 1.0)]):
        if share <= x1:
            return y0 + (y1 - y0) * (share - x0) / (x1 - x0)
    return 1.0
