"""Simulate every combination of traces, capacities, policies and starts: one row of results each.

Shapes: V events. A capacity is a share of a layer's experts: "25%", rounded to slots, and never fewer than top-k (no
cache works below). `pooled` gives all layers one cache of as many slots.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache import POLICIES, Policy
from ...config.settings import OffloadConfig
from ...config.sizes import parse_share
from ...errors import ConfigError
from ...observe.trace import Trace
from . import plain
from .stream import Stream, per_layer, pool_layers

ALL = ["lru", "lfu", "decayed_lfu:16", "decayed_lfu:64", "decayed_lfu:256", "lrfu_classes", "tiny_lfu", "default"]
#: Those that are told what is to come (`cache/belady.py`): bounds, no policies.
ORACLES = ("belady", "belady_bypass")
ALL += ORACLES
STARTS = ("warm", "cold")
COMPILED_EVENTS = 1000  # of a stream: all layers of shorter ones are replayed sooner than numba has compiled
FIRST_TOKENS = 32  # of a request, reported apart

Ints = NDArray[np.int64]
Make = Callable[[int, float], Policy]


@dataclass(frozen=True)
class SimulationResult:
    """What one policy did on one trace. Rates are shares, 0 to 1, of the distinct experts that events asked for."""

    trace: str
    capacity: float
    slots: int  # per layer, the largest where layers differ
    policy: str
    start: str  # warm: the cache lives on from request to request; cold: each request begins with nothing
    pooled: bool
    hit_rate: float
    first_tokens_hit_rate: float  # over the first 32 tokens of every request
    clean_layer_steps: float  # share of the events without a miss
    misses_per_token: float
    bytes_per_token: float | None  # where the trace states `row_bytes`
    gap_closed: float | None  # (hit rate - LRU's) / (MIN's - LRU's), where there is a gap


def simulate(
    traces: Mapping[str, Trace] | Sequence[Trace],
    policies: Sequence[str] = ALL,
    capacities: Sequence[str | float] = ("25%",),
    *,
    starts: Sequence[str] = ("warm",),
    pool: bool = False,
    extra: Mapping[str, Make] | None = None,
) -> list[SimulationResult]:
    """One row each. A policy is a name of POLICIES, with ":half_life" where it has one, of ORACLES, "default" (the
    product's), or one of `extra`: your own, made from (experts, half_life).

    Raises ConfigError for a policy, capacity or start that does not exist.
    """
    shares = [parse_capacity(capacity) for capacity in capacities]
    replays = {name: _replay(name, dict(extra or {})) for name in policies}
    for start in starts:
        if start not in STARTS:
            raise ConfigError(f"start {start!r} does not exist; there are {', '.join(STARTS)}")
    named = traces if isinstance(traces, Mapping) else {f"trace {i}": trace for i, trace in enumerate(traces)}
    return [
        row
        for name, trace in named.items()
        for start in starts
        for share in shares
        for row in _rows(name, trace, share, start, replays, pool)
    ]


def replay_stream(stream: Stream, slots: int, policy: str) -> tuple[Ints, Ints]:
    """`asked_V`, `hits_V` of one stream under a policy that `simulate` knows, from an empty cache."""
    return _replay(policy, {})(stream, slots)


def parse_capacity(given: str | float) -> float:
    """ "25%" or 0.25 as 0.25."""
    try:
        return parse_share(given)
    except ConfigError as error:
        raise ConfigError(f"--residency {error}") from None


def slots_of(trace: Trace, share: float) -> list[int]:
    """Slots of each layer."""
    return [max(min(trace.top_k, experts), round(share * experts)) for experts in trace.num_experts]


class _Replay:
    """`asked_V`, `hits_V` of a stream, from an empty cache: compiled where it is built in, else through the cache."""

    def __init__(self, make: Callable[[Stream], Policy], kind: str, half_life: float):
        self.make, self.kind, self.half_life = make, kind, half_life

    def __call__(self, stream: Stream, slots: int) -> tuple[Ints, Ints]:
        if self.kind in ORACLES:
            return plain.replay_min(stream, slots, bypass=self.kind == "belady_bypass")
        fast = _fast() if len(stream.first_V) >= COMPILED_EVENTS else None
        if fast and self.kind in fast.KINDS:
            found: tuple[Ints, Ints] = fast.replay_fast(stream, slots, self.kind, self.half_life)
            return found
        return plain.replay_policy(stream, slots, self.make(stream))


@cache
def _fast() -> Any:
    """The module `fast`, or None. Asked for by the first replay: importing numba takes longer than most commands."""
    try:
        from . import fast
    except (ImportError, RuntimeError):  # numba was taken away, or finds no folder for what it compiles
        return None
    return fast


def _replay(name: str, extra: Mapping[str, Make]) -> _Replay:
    if name in extra:
        return _Replay(lambda stream: extra[name](stream.num_experts, OffloadConfig().half_life), "", 0.0)
    default = OffloadConfig()
    base, colon, tail = name.partition(":")
    try:
        half_life = float(tail) if colon else default.half_life
        if not 0 < half_life < float("inf") or (colon and base != "decayed_lfu"):
            raise ValueError
    except ValueError:
        raise ConfigError(f"policy {name!r}: only decayed_lfu takes a half-life, in tokens: decayed_lfu:32") from None
    base = default.policy if base == "default" else base
    if base in POLICIES:
        return _Replay(lambda stream: POLICIES[base](stream.num_experts, half_life), base, half_life)
    if base not in ORACLES:
        known = ["default", *POLICIES, *ORACLES, *extra]
        raise ConfigError(f"policy {name!r} does not exist; there are {', '.join(known)}, and all")
    return _Replay(lambda stream: POLICIES["lru"](stream.num_experts, half_life), base, half_life)


def _rows(
    name: str, trace: Trace, share: float, start: str, replays: Mapping[str, _Replay], pool: bool
) -> Iterator[SimulationResult]:
    slots = slots_of(trace, share)
    streams, caches = ([pool_layers(trace)], [sum(slots)]) if pool else (per_layer(trace), slots)
    row_bytes = trace.meta.get("row_bytes", "")
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # the compiled replay lets go of the interpreter
        played = {
            policy: list(threads.map(partial(_play, replay, cold=start == "cold"), streams, caches))
            for policy, replay in {**replays, **_bounds(replays)}.items()
        }
    hits = {policy: sum(int(hits_V.sum()) for _, hits_V in parts) for policy, parts in played.items()}
    gap = hits["belady"] - hits["lru"]
    early = [_early(stream) for stream in streams]
    for policy in replays:
        parts = played[policy]
        asked = sum(int(asked_V.sum()) for asked_V, _ in parts)
        clean = sum(int((asked_V == hits_V).sum()) for asked_V, hits_V in parts)
        misses_per_token = (asked - hits[policy]) / trace.tokens
        yield SimulationResult(
            trace=name,
            capacity=share,
            slots=max(slots),
            policy=policy,
            start=start,
            pooled=pool,
            hit_rate=hits[policy] / asked,
            first_tokens_hit_rate=sum(int(h[v].sum()) for (_, h), v in zip(parts, early, strict=True))
            / sum(int(a[v].sum()) for (a, _), v in zip(parts, early, strict=True)),
            clean_layer_steps=clean / sum(len(asked_V) for asked_V, _ in parts),
            misses_per_token=misses_per_token,
            bytes_per_token=misses_per_token * int(row_bytes) if row_bytes.isdecimal() else None,
            gap_closed=(hits[policy] - hits["lru"]) / gap if gap > 0 else None,
        )


def _bounds(replays: Mapping[str, _Replay]) -> dict[str, _Replay]:
    """LRU and MIN, without which no gap can be told."""
    return {name: _replay(name, {}) for name in ("lru", "belady") if name not in replays}


def _play(replay: _Replay, stream: Stream, slots: int, *, cold: bool) -> tuple[Ints, Ints]:
    if not cold:
        return replay(stream, slots)
    parts = [replay(request, slots) for request in stream.by_request()]
    return np.concatenate([asked_V for asked_V, _ in parts]), np.concatenate([hits_V for _, hits_V in parts])


def _early(stream: Stream) -> NDArray[np.bool_]:
    """The events that begin within the first tokens of their request."""
    before_V = np.cumsum(stream.tokens_V) - stream.tokens_V
    begins = np.append(True, np.diff(stream.request_V) > 0)
    of_request_V = before_V - np.maximum.accumulate(np.where(begins, before_V, 0))
    return np.asarray(of_request_V < FIRST_TOKENS)
