"""How fast things go: the difference of two looks at one model."""

from __future__ import annotations

from dataclasses import dataclass

from ...cache.counters import Counters
from ...observe.live.snapshot import Snapshot


@dataclass(frozen=True)
class Rates:
    """`stall_share` is the part of the time that compute waited for rows, `hit_rate` None where nothing was asked for;
    `hit_rates` are those of the layers."""

    tokens_per_s: float
    bytes_per_s: float
    stall_share: float
    hit_rate: float | None
    hit_rates: list[float | None]


def rates_between(before: Snapshot, now: Snapshot) -> Rates | None:
    """What went on between two snapshots; None where no time has passed, or they are not of one model."""
    passed_s = now.uptime_s - before.uptime_s
    same = before.pid == now.pid and len(before.layers) == len(now.layers)
    if passed_s <= 0 or not same:
        return None
    since = now - before
    return Rates(
        tokens_per_s=since.tokens / passed_s,
        bytes_per_s=since.moved_bytes / passed_s,
        stall_share=min(since.stall_s / passed_s, 1.0),
        hit_rate=_hit_rate(since),
        hit_rates=[_hit_rate(b - a) for a, b in zip(before.layers, now.layers, strict=True)],
    )


def _hit_rate(since: Counters) -> float | None:
    return since.hit_rate if since.requests > 0 else None
