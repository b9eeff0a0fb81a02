"""One layer's cache as tensors of the compute device, at addresses that never change: what a CUDA graph can use.

Shapes: P = T*K token-expert pairs of one event, E experts, S slots, N elements of one row.

`DeviceState` is `cache.LayerCache` with the policy `decayed_lfu`, event for event, as long as no load fails: here one
cannot, since the rows lie in memory. `pull` and `push` carry the state over to a `LayerCache` and back, for what the
host decides (a prompt, a profile, a row that is only on disk). Those of all layers lie in one block (`state_block.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache import DecayedLFU
from ...cache.counters import Counters, LayerCounters
from ...cache.decay import Rate, mean_decay, unit_growth
from ...cache.layer_cache import LayerCache

EVENTS, HITS, MISSES, REFUSED = range(4)
GUESSED, USED, LATE, WASTED_BYTES = range(4)


@dataclass(frozen=True)
class DeviceState:
    """`used_E` and `unit_1` are those of `cache/decay.py`'s `Rate`; -1 in a table is absent, or empty.

    `totals_4` counts events, hits, misses, and pairs whose id was out of range (they compute with slot 0, and the step
    is refused once the host looks). Hits and misses go on from the host's, events from those that the device decided:
    so `pull` may be interrupted and done again. `guesses_4` counts rows that were guessed, those of them that were
    asked for, those of these that were not complete by then, and the bytes that were copied of the others.
    """

    slot_of_E: Tensor  # int32
    expert_at_S: Tensor  # int32
    used_E: Tensor  # float64
    unit_1: Tensor  # float64
    counts_E: Tensor  # int64: uses, every pair counted
    totals_4: Tensor  # int64
    guesses_4: Tensor  # int64

    def push(self, cache: LayerCache) -> None:
        """Take over what the host decided. Nothing may be pending there."""
        if cache.pending:
            raise AssertionError(f"{cache.name}: loads are pending")
        rate = _rate(cache)
        self.slot_of_E.copy_(torch.tensor(cache.slot_of, device="cpu"))
        self.expert_at_S.copy_(torch.tensor(cache.expert_at, device="cpu"))
        self.used_E.copy_(torch.tensor(rate.used, dtype=torch.float64, device="cpu"))
        self.unit_1.fill_(rate.unit)
        counters = cache.counters
        self.counts_E.copy_(torch.tensor(counters.counts, device="cpu"))
        self.totals_4.copy_(torch.tensor([counters.by_device, counters.hits, counters.misses, 0], device="cpu"))
        self.guesses_4[USED:].copy_(torch.tensor([counters.ahead, counters.late, counters.wasted_bytes], device="cpu"))

    def forget(self) -> None:
        """Nothing is resident any more; what was counted and scored stays."""
        self.slot_of_E.fill_(-1)
        self.expert_at_S.fill_(-1)

    def pull(self, cache: LayerCache, top_k: int, row_bytes: int) -> None:
        """Give back what the device decided since `push`; each miss read `row_bytes`."""
        rate = _rate(cache)
        cache.slot_of, cache.expert_at = self.slot_of_E.tolist(), self.expert_at_S.tolist()
        cache.free = [slot for slot in reversed(range(cache.slots)) if cache.expert_at[slot] < 0]
        rate.used, rate.unit = self.used_E.tolist(), float(self.unit_1)
        cache.counters = self.counters(cache.counters, top_k, row_bytes)

    def counters(self, known: LayerCounters, top_k: int, row_bytes: int) -> LayerCounters:
        """`known`, the host's, and what the device has counted since `push`. Changes nothing; any thread may ask."""
        counts = self.counts_E.tolist()
        by_device, hits, misses, _ = self.totals_4.tolist()
        _, used, late, wasted_bytes = self.guesses_4.tolist()
        events, missed = by_device - known.by_device, misses - known.misses
        since = Counters(
            events=events,
            by_device=events,
            tokens=(sum(counts) - sum(known.counts)) // top_k,
            hits=hits - known.hits,
            misses=missed,
            bytes_read=missed * row_bytes,
            ahead=used - known.ahead,
            late=late - known.late,
            wasted_bytes=wasted_bytes - known.wasted_bytes,
        )
        return LayerCounters(**(known + since).values(), counts=counts)


@dataclass(frozen=True)
class Loads:
    """What one event has to load: `expert` into `slot`, for the first `count` entries; -1 in those after."""

    expert_P: Tensor  # int32
    slot_P: Tensor  # int32
    count_1: Tensor  # int32

    @staticmethod
    def empty(pairs: int, device: torch.device | str) -> Loads:
        def full(size: int, value: int) -> Tensor:
            return torch.full((size,), value, dtype=torch.int32, device=device)

        return Loads(full(pairs, -1), full(pairs, -1), full(1, 0))


def make_pace(tokens: int, half_life: float, device: torch.device | str) -> Tensor:
    """float64 [2]: what the unit grows by in an event of so many tokens, and what share of it each use adds."""
    return torch.tensor(
        [unit_growth(tokens, half_life), mean_decay(tokens, half_life)], dtype=torch.float64, device=device
    )


def _rate(cache: LayerCache) -> Rate:
    if not isinstance(cache.policy, DecayedLFU):
        raise AssertionError(f"{cache.name}: the device decides by decayed_lfu, not {type(cache.policy).__name__}")
    return cache.policy.rate
