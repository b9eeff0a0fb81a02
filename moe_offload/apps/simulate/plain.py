"""A stream replayed through the runtime's own cache, by the rules of the runtime: the reference, for any policy."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ...cache import Policy
from ...cache.belady import belady_hits
from ...cache.layer_cache import LayerCache
from ...observe.trace import Event
from .stream import Stream


def ask_cache(cache: LayerCache, event: Event, row_bytes: int = 0) -> int:
    """What `LayerRuntime` does with one event; returns the hits. Every load arrives."""
    before = cache.counters.hits
    without_slot: list[int] = []
    if cache.fits(event.used.total()):
        loads = cache.lookup(event.used, event.tokens)
    else:
        loads, without_slot = cache.fill(event.used, event.tokens)
    for load in loads:
        cache.commit(load, row_bytes)
    for _ in without_slot:
        cache.count_miss(row_bytes)
    return cache.counters.hits - before


def replay_events(events: Iterable[Event], cache: LayerCache, row_bytes: int = 0) -> NDArray[np.int64]:
    """The hits of each event; the cache has counted them, and the misses and bytes, as the runtime does."""
    return np.array([ask_cache(cache, event, row_bytes) for event in events], dtype=np.int64)


def replay_policy(stream: Stream, slots: int, policy: Policy) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`asked_V`, `hits_V` of a cache that starts empty."""
    events = list(stream.events())
    asked_V = np.array([len(event.used) for event in events], dtype=np.int64)
    return asked_V, replay_events(events, LayerCache(stream.num_experts, slots, policy))


def replay_min(stream: Stream, slots: int, bypass: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same of Belady's MIN."""
    events = [event.used for event in stream.events()]
    asked_V = np.array([len(used) for used in events], dtype=np.int64)
    return asked_V, np.array(belady_hits(events, slots, bypass), dtype=np.int64)
