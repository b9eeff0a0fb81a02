"""What an offloaded model has done: every counter is declared here, once.

A field says in its metadata what it counts (`description`), its `unit`, and its name among the Prometheus metrics
(`metric`). Statistics, snapshots, metrics, traces and reports are made from these fields: a new counter is one more
line in `Counters`, and whatever increments it. `ge` and `le` are the bounds that hold where a counter is read from a
file or a socket; pydantic takes them from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any


def _count(description: str, metric: str, unit: str = "", combine: str = "sum") -> Any:
    about = {"description": description, "metric": metric, "unit": unit, "combine": combine}
    return field(default=0, metadata={**about, "ge": 0, "le": 2**53})  # every JSON reader keeps these exact


def _seconds(description: str, metric: str) -> Any:
    about = {"description": description, "metric": metric, "unit": "seconds", "combine": "sum"}
    return field(default=0.0, metadata={**about, "ge": 0, "le": 1e12, "allow_inf_nan": False})


@dataclass
class Counters:
    """Counters of one layer, or of all layers of a model (`total`).

    An event is one forward of one layer. It requests each expert it needs once, however many tokens use it.
    """

    events: int = _count("Forwards of a layer", "events")
    tokens: int = _count("Tokens that went through the model", "tokens", combine="max")
    hits: int = _count("Requests (distinct experts per layer and forward) whose expert was in a slot", "hits")
    misses: int = _count("Requests whose expert had to be read", "misses")
    streamed: int = _count("Misses that passed through scratch without taking a slot", "streamed")
    bytes_read: int = _count("Bytes read for requests", "read_bytes", unit="bytes")
    prewarm_bytes: int = _count("Bytes read by pre-warming", "prewarm_bytes", unit="bytes")
    stall_s: float = _seconds("Seconds that compute waited for rows", "stall_seconds")
    ahead: int = _count("Misses whose row was being read before it was asked for", "prefetch_useful")
    late: int = _count("Useful prefetches whose row was not complete when it was asked for", "prefetch_late")
    wasted_bytes: int = _count("Bytes read ahead and not needed", "prefetch_wasted_bytes", unit="bytes")
    by_device: int = _count("Events that the device decided without the host", "device_events")

    @property
    def requests(self) -> int:
        """Distinct experts asked for, summed over events."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Hits over requests; 0.0 where nothing was asked for."""
        return self.hits / self.requests if self.requests else 0.0

    @property
    def by_host(self) -> int:
        """Events for which the device waited for the host to decide."""
        return self.events - self.by_device

    @property
    def moved_bytes(self) -> int:
        """All bytes that were read, for whatever reason."""
        return self.bytes_read + self.prewarm_bytes + self.wasted_bytes

    def values(self) -> dict[str, Any]:
        """`{name: value}` of the counters alone, whatever a subclass adds to them."""
        return {name: getattr(self, name) for name in COUNTERS}

    def __add__(self, other: Counters) -> Counters:
        """Both, one after the other."""
        return Counters(**{name: getattr(self, name) + getattr(other, name) for name in COUNTERS})

    def __sub__(self, earlier: Counters) -> Counters:
        """What happened since `earlier`."""
        return Counters(**{name: getattr(self, name) - getattr(earlier, name) for name in COUNTERS})

    @staticmethod
    def total(layers: Iterable[Counters]) -> Counters:
        """All layers of a model together: sums, but each token goes through every layer and counts once."""
        parts = list(layers)
        return Counters(**{name: COMBINE[name](getattr(part, name) for part in parts) for name in COUNTERS})


def _largest(values: Iterable[Any]) -> Any:
    return max(values, default=0)


#: The names of the counters, in the order of their declaration.
COUNTERS: tuple[str, ...] = tuple(f.name for f in fields(Counters))
#: What is said of each: `description`, `unit`, `metric`, `combine`.
ABOUT: dict[str, Any] = {f.name: f.metadata for f in fields(Counters)}
#: How each is combined over the layers of a model.
COMBINE: dict[str, Any] = {name: _largest if about["combine"] == "max" else sum for name, about in ABOUT.items()}


@dataclass
class LayerCounters(Counters):
    """What the cache of one layer counts: besides the counters, how often each expert was used (a profile)."""

    counts: list[int] = field(default_factory=list)  # [E], every token-expert pair counted

    def count_event(self, used: Mapping[int, int], tokens: int) -> None:
        """One event more; `used`: by how many of its `tokens` each expert is used.

        All is set in a single call of C: neither Ctrl-C nor another thread finds uses without their tokens.
        """
        counts = self.counts.copy()
        for expert, uses in used.items():
            counts[expert] += uses
        vars(self).update(events=self.events + 1, tokens=self.tokens + tokens, counts=counts)

    def snapshot(self) -> LayerCounters:
        """A copy whose counters belong together, whatever another thread counts meanwhile."""
        return LayerCounters(**vars(self))


@dataclass(kw_only=True)
class LayerStats(Counters):
    """One layer as of now: what it is, and what it has done.

    Args:
        name: The path of its experts module.
        experts: Experts of the layer, E.
        slots: Of them, how many fit on the compute device at once, S.
        resident: How many are in slots now.
        row_bytes: Bytes of one expert.
        decides: Who chooses which expert gives way in decode steps: "host" or "device".
    """

    name: str
    experts: int
    slots: int
    resident: int
    row_bytes: int
    decides: str = "host"


@dataclass(kw_only=True)
class Stats(Counters):
    """What has happened since the model was optimised: the counters over all layers, and layer by layer.

    Args:
        graphs: Graphs compiled so far.
        layers: The same counters for each MoE layer, and the state of its slots.
    """

    graphs: int = 0
    layers: list[LayerStats] = field(default_factory=list, repr=False)

    def __sub__(self, earlier: Counters) -> Stats:
        """What happened between two calls of `stats()`: totals only."""
        return Stats(**super().__sub__(earlier).values(), graphs=self.graphs - getattr(earlier, "graphs", 0))
