"""How fast things go: the difference of two looks at one model."""

from __future__ import annotations

from dataclasses import dataclass

from .snapshot import Counts, Snapshot


@dataclass(frozen=True)
class Rates:
    """`stall_share` is the part of the time that compute waited for rows, `hit_rate` None where nothing was asked for;
    `hit_rates` are those of the layers."""

    tokens_per_s: float
    bytes_per_s: float
    stall_share: float
    hit_rate: float | None
    hit_rates: list[float | None]


def between(before: Snapshot, now: Snapshot) -> Rates | None:
    """What went on between two snapshots; None where no time has passed, or they are not of one model."""
    passed_s = now.uptime_s - before.uptime_s
    same = before.pid == now.pid and len(before.layers) == len(now.layers)
    if passed_s <= 0 or not same:
        return None
    return Rates(
        tokens_per_s=(now.tokens - before.tokens) / passed_s,
        bytes_per_s=(now.moved_bytes - before.moved_bytes) / passed_s,
        stall_share=min((now.stall_s - before.stall_s) / passed_s, 1.0),
        hit_rate=_hit_rate(before, now),
        hit_rates=[_hit_rate(a, b) for a, b in zip(before.layers, now.layers, strict=True)],
    )


def _hit_rate(before: Counts, now: Counts) -> float | None:
    requests = now.requests - before.requests
    return (now.hits - before.hits) / requests if requests > 0 else None
