"""What an offloaded model has done: counters that add up over layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stats:
    """What has happened since the model was optimised. Requests are distinct experts per layer and step.

    `hit_rate` is hits over requests; `bytes_read` counts what requests read from the tier below, `prewarm_bytes` what
    pre-warming read; `stall_s` is time that compute waited for either. `ahead` of the misses had been expected and were
    being read before they were asked for, `late` of those were not complete when they were; `wasted_bytes` were read
    for expectations that did not come true. An event is one step of one layer; `by_device` of them were decided by the
    device, and for the others (`by_host`) it waited for the host.
    """

    hits: int
    misses: int
    streamed: int
    bytes_read: int
    prewarm_bytes: int
    stall_s: float
    ahead: int
    late: int
    wasted_bytes: int
    events: int
    by_device: int
    tokens: int
    graphs: int
    layers: list[dict[str, Any]] = field(repr=False)

    @property
    def hit_rate(self) -> float:
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 0.0

    @property
    def by_host(self) -> int:
        return self.events - self.by_device

    def __sub__(self, earlier: Stats) -> Stats:
        """What happened between two calls of `stats()` (totals only)."""
        names = (*TOTALS, "tokens", "graphs")
        return Stats(**{n: getattr(self, n) - getattr(earlier, n) for n in names}, layers=[])


#: The counters of `cache.Counters` that add up over layers.
TOTALS = (
    "hits", "misses", "streamed", "bytes_read", "prewarm_bytes", "stall_s", "ahead", "late", "wasted_bytes", "events",
    "by_device",
)  # fmt: skip
